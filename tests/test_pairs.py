"""Sources and targets, from a file to an answer: what is written, what is learnt, what is said about what cannot be."""

import json
import random
import re
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY

import checkpoint as ckpt
from data import bins
from data.pairs.prepare import read_json
from data.scan.prepare import commands
from model import GPT, GPTConfig

sys.path.insert(0, str(ROOT / 'tools'))

WORDS = 'the a red città naïve 日本 <|endoftext|> "quoted" don\'t jump x7 ß'.split()


def some_pairs(n, seed=0):
    rng = random.Random(seed)
    phrase = lambda most: ' '.join(rng.choices(WORDS, k=rng.randint(1, most)))  # noqa: E731
    pairs = [(phrase(6), phrase(9)) for _ in range(n)]
    return pairs + [(source, phrase(5)) for source, _ in pairs[::7]]  # some sources have two targets


def documents_of(data, split):
    """[(row, [source, target, ...])] out of the raw file, by its own rules: 2 ends of text begin a document."""
    ids = np.fromfile(data / f'{split}.bin', dtype=np.uint16)
    meta = json.loads((data / 'meta.json').read_text())
    made = bins.open_tokenizer(data)
    rows = ids.reshape(-1, meta['pairs']['block_size']).tolist()
    found = []
    for number, row in enumerate(rows):
        parts, document = [[]], []
        assert row[0] == made.eot
        for id_ in [*row[1:], made.eot]:
            if id_ != made.eot:
                parts[-1].append(id_)
            elif parts[-1]:
                document.append(made.decode(parts[-1]))
                parts.append([])
            elif document:
                found.append((number, document))
                document = []
    return found


@pytest.fixture(scope='module')
def prepare(run, clone):
    """prepare(lines or objects, '--key=value', ...) -> the folder of their bins."""

    def prepare(lines, *arguments, name='tested', **options):
        objects = not isinstance(lines[0], tuple)
        path = clone / f'{name}.{"jsonl" if objects else "tsv"}'
        text = (json.dumps(line, ensure_ascii=False) if objects else '\t'.join(line) for line in lines)
        path.write_text(''.join(line + '\n' for line in text), encoding='utf-8')
        prepare.result = run('data/pairs/prepare.py', f'--input={path}', f'--dataset={name}', *arguments, **options)
        return clone / 'data' / name

    return prepare


@pytest.mark.parametrize('kind', ['bpe', 'char', 'byte'])
@pytest.mark.parametrize('packing', [True, False])
def test_pairs_come_back_whole_and_no_source_is_in_both_splits(prepare, kind, packing):
    pairs = some_pairs(80)
    lines = [(*pair, 'licence')[: 2 + i % 2] for i, pair in enumerate(pairs)]  # some have a third column
    options = ('--vocab_size=300', '--block_size=160', f'--packing={packing}', '--val_fraction=0.2')
    data = prepare(lines, f'--tokenizer={kind}', *options)
    train, val = documents_of(data, 'train'), documents_of(data, 'val')
    assert Counter((source, target) for _, (source, target) in train + val) == Counter(pairs)
    assert not {source for _, (source, _) in train} & {source for _, (source, _) in val}
    assert 0.05 * len(pairs) < len(val) < 0.4 * len(pairs)
    in_a_row = Counter(row for row, _ in train).values()
    meta = json.loads((data / 'meta.json').read_text())
    if packing:  # little is wasted
        n_ids = sum(len(bins.open_tokenizer(data).encode_to_numpy(text)) for _, pair in train for text in pair) + 3 * len(train)
        assert n_ids > 0.85 * meta['train_tokens'] and max(in_a_row) > 1
    else:
        assert set(in_a_row) == {1} and meta['train_tokens'] == 160 * len(train)


def test_a_source_stays_in_its_split_when_the_file_grows(prepare):
    pairs = some_pairs(150)
    small = prepare(pairs[:80], '--tokenizer=byte', '--block_size=256', '--val_fraction=0.3')
    before = {source for _, (source, _) in documents_of(small, 'val')}
    large = prepare(pairs, '--tokenizer=byte', '--block_size=256', '--val_fraction=0.3')
    assert before == {source for _, (source, _) in documents_of(large, 'val')} & {source for source, _ in pairs[:80]}


@pytest.mark.parametrize('mask_prompt', [True, False])
@pytest.mark.parametrize('packing', [True, False])
def test_only_targets_have_a_loss(prepare, packing, mask_prompt):
    pairs = some_pairs(40)
    folder = prepare(pairs, '--tokenizer=byte', '--block_size=192', f'--packing={packing}', f'--mask_prompt={mask_prompt}')
    data = bins.open_dataset(folder, 192)
    x, y = data.train.batch(0, data.train.n_windows, seed=1)
    learnt = Counter()
    for row, following in zip(x.tolist(), y.tolist()):
        assert all(b in (-1, a) for a, b in zip(row[1:], following)) and following[-1] == -1
        learnt.update(id_ for id_ in following if id_ >= 0)
    expected = Counter()  # all that is to be written: targets and their ends, without mask_prompt sources and their ends too
    for _, (source, target) in documents_of(folder, 'train'):
        expected.update([*target.encode(), 256] + ([*source.encode(), 256] if not mask_prompt else []))
    assert learnt == expected
    assert data.train.count_targets(0, len(x), seed=1) == sum(expected.values())

    model = GPT(GPTConfig(block_size=192, vocab_size=257, n_layer=1, n_head=1, n_embd=8))
    logits, loss = model(torch.tensor(x), torch.tensor(y))
    logits.retain_grad()
    loss.backward()
    assert (logits.grad[torch.tensor(y) < 0] == 0).all() and (logits.grad[torch.tensor(y) >= 0].abs().sum(dim=-1) > 0).all()


def test_a_packed_pair_has_the_loss_that_it_has_alone(prepare):
    pairs = some_pairs(30)
    options = ('--tokenizer=byte', '--block_size=256')
    folders = [prepare(pairs, *options, f'--packing={p}', name=f'packed-{p}') for p in (True, False)]
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=256, vocab_size=257, n_layer=2, n_head=2, n_embd=16, position='none', ngram=3, ngram_rows=97,
                          document_token=256, turns=1, prefix_lm=True))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    sums = []
    for folder in folders:
        split = bins.open_dataset(folder, 256).train
        x, y = (torch.tensor(part) for part in split.windows(range(split.n_windows)))
        sums.append(model(x, y)[1].item() * (y >= 0).sum().item())
    assert len(x) == len(documents_of(folders[1], 'train')) and sums[0] == pytest.approx(sums[1], rel=1e-5)


def test_files_of_windows_are_read_alike(prepare, run, clone):
    pairs = some_pairs(30)
    plain = prepare(pairs, '--tokenizer=char', '--block_size=256')
    expected = [documents_of(plain, split) for split in ('train', 'val')]
    text = '\r\n'.join(f' {source}\t{target} ' for source, target in pairs)
    (clone / 'windows.tsv').write_bytes(b'\xef\xbb\xbf' + text.encode() + b'\r\n\r\n')
    run('data/pairs/prepare.py', '--input=windows.tsv', '--dataset=windows', '--tokenizer=char', '--block_size=256')
    assert [documents_of(clone / 'data' / 'windows', split) for split in ('train', 'val')] == expected


def test_chats_become_turns():
    def parts(*messages):
        return read_json(json.dumps({'messages': [{'role': role, 'content': text} for role, text in messages]}))

    assert parts(('user', 'a'), ('assistant', 'b')) == ['a', 'b']
    answered = (('user', 'a'), ('assistant', 'b'), ('user', 'c'), ('assistant', 'd'))
    assert parts(('system', 's'), *answered) == ['s\n\na', 'b', 'c', 'd']
    assert parts(('user', 'a'), ('user', 'b'), ('assistant', 'c'), ('assistant', 'd')) == ['a\n\nb', 'c\n\nd']
    assert read_json('{"prompt": "a", "response": "b", "id": 3}') == ['a', 'b']


def test_long_pairs_are_counted_and_named_and_none_is_cut(prepare):
    pairs = some_pairs(20)
    pairs[3] = ('x' * 100, 'y')
    pairs[11] = ('x', 'y' * 90)
    data = prepare(pairs, '--tokenizer=byte', '--block_size=90')
    said = prepare.result.stdout
    assert '2 longer than block_size = 90 left out (lines 4, 12); --block_size=104 keeps all' in said
    kept = [tuple(pair) for split in ('train', 'val') for _, pair in documents_of(data, split)]
    assert Counter(kept) == Counter(pair for i, pair in enumerate(pairs) if i not in (3, 11))


MESSAGES = '{"messages": [{"role": "user", "content": "a"}, %s]}'


@pytest.mark.parametrize(
    'lines, suffix, says',
    [
        (['a\tb', 'no tab'], 'tsv', 'line 2: there is no tab'),
        (['a\tb', 'a\t '], 'tsv', 'line 2: a side is empty'),
        (['\tb'], 'tsv', 'line 1: a side is empty'),
        ([b'a\tb', b'\xff\tb'], 'tsv', 'line 2: not UTF-8'),
        (['{"prompt": "a", "response": "b"}', '', '{"prompt": '], 'jsonl', 'line 3: not JSON'),
        (['[' * 100000], 'jsonl', 'line 1: not JSON'),
        (['{"prompt": "a", "response": "b \\ud83d"}'], 'jsonl', 'line 1: not UTF-8'),
        (['{"prompt": "a"}'], 'jsonl', 'line 1: give {"prompt": text, "response": text}'),
        (['{"prompt": "a", "response": " "}'], 'jsonl', 'line 1: a side is empty'),
        ([MESSAGES % '{"role": "bot", "content": "b"}'], 'jsonl', "line 1: role 'bot' is none of system, user, assistant"),
        ([MESSAGES % '{"role": "user", "content": "b"}'], 'jsonl', "line 1: the last message is not the assistant's"),
        ([MESSAGES % '{"role": "assistant", "content": ""}'], 'jsonl', 'line 1: the content of a message (assistant) is empty'),
        (['{"messages": [{"role": "assistant", "content": "a"}]}'], 'jsonl', 'nothing that it answers'),
        (['{"messages": [{"role": "user"}]}'], 'jsonl', 'line 1: a message is {"role": text, "content": text}'),
        (['{"messages": []}'], 'jsonl', 'line 1: the last message'),
        (['', ' '], 'tsv', 'there is no pair in it'),
        ([f'{"a" * 99}\tb', f'{"c" * 40}\td'], 'tsv', 'no pair is left: 2 longer than block_size = 20'),
        (['a\tb', 'a\tc'], 'tsv', 'no pair is left to train on'),
    ],
)
def test_a_bad_pair_is_one_sentence_with_its_line(refused, clone, tmp_path, lines, suffix, says):
    path = tmp_path / f'bad.{suffix}'
    path.write_bytes(b'\n'.join(line if isinstance(line, bytes) else line.encode() for line in lines))
    options = ('--tokenizer=byte', '--block_size=20', '--dataset=bad')
    refused('data/pairs/prepare.py', f'--input={path}', *options, says=(str(path), says))
    assert not (clone / 'data' / 'bad' / 'train.bin').exists()


def test_other_mistakes_with_pairs_are_one_sentence(refused, run, prepare, char_data, trained, clone, tmp_path):
    data = prepare(some_pairs(20), '--tokenizer=byte', '--block_size=100')
    train = ('train.py', f'--out_dir={tmp_path}/out', *TINY)
    refused(*train, f'--dataset={data}', says=('block_size = 32: the rows of', 'have 100 tokens', '--block_size=100'))
    refused(*train, f'--dataset={data}', '--block_size=128', says=('block_size = 128', 'have 100 tokens: give --block_size=100'))
    fits = (f'--dataset={data}', '--block_size=100')
    refused(*train, *fits, '--doc_mask=False', says=('doc_mask = False', '--packing=False'))
    refused(*train, f'--dataset={char_data}', '--prefix_lm', says=('prefix_lm = True', 'has no sources and targets'))
    refused('tools/compare_rnn.py', f'--dataset={data}', f'--out_dir={tmp_path}/out', says='has sources and targets')
    refused('tools/evaluate.py', f'--out_dir={trained}', '--task=pairs', says='was trained on plain text')
    refused('tools/evaluate.py', f'--out_dir={trained}', '--task=lambada', says='name its file with --input=PATH')
    refused('data/pairs/prepare.py', says='name your pairs')
    refused('data/pairs/prepare.py', '--input=nowhere', says='--input=nowhere: there is no such file')
    assert not (tmp_path / 'out').exists()


def losses(out_dir):
    lines = [json.loads(line) for line in (out_dir / 'log.jsonl').read_text().splitlines()]
    return [line[key] for line in lines for key in ('loss', 'grad_norm') if key in line]


def test_a_step_weighs_every_target_alike_however_it_is_cut(run, prepare, clone, tmp_path):
    """Micro-batches, of one process or of two, have very different numbers of targets."""
    rng = random.Random(1)
    pairs = [('q' * rng.randint(1, 30), 'a' * rng.choice((1, 2, 60))) for _ in range(60)]
    data = prepare(pairs, '--tokenizer=byte', '--block_size=100', '--packing=False')
    common = (f'--dataset={data}', *TINY, '--block_size=100', '--max_iters=5', '--lr_decay_iters=5', '--dtype=float32')
    run('train.py', *common, f'--out_dir={tmp_path}/8', '--batch_size=8')
    run('train.py', *common, f'--out_dir={tmp_path}/2', '--batch_size=2', '--gradient_accumulation_steps=4')
    arguments = [*common, f'--out_dir={tmp_path}/two', '--batch_size=1', '--gradient_accumulation_steps=8']
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', 'train.py']
    subprocess.run([*torchrun, *arguments], cwd=clone, check=True, capture_output=True, timeout=200)
    whole = losses(tmp_path / '8')
    assert len(whole) == 10
    assert losses(tmp_path / '2') == pytest.approx(whole, abs=2e-5) and losses(tmp_path / 'two') == pytest.approx(whole, abs=2e-5)


@pytest.fixture(scope='module')
def chatty(run, prepare, tmp_path_factory):
    """(folder of a run, its data) of chats of two turns, hardly trained."""
    lines = [{'messages': [{'role': role, 'content': f'{word} {i}'} for word, role in
                           (('hello', 'user'), ('hi', 'assistant'), ('and', 'user'), ('so', 'assistant'))]} for i in range(60)]
    data = prepare(lines, '--tokenizer=byte', '--block_size=64', name='chatty')
    out = tmp_path_factory.mktemp('chatty') / 'out'
    options = ('--block_size=64', '--prefix_lm', '--max_iters=80', '--optimizer=muon', '--muon_learning_rate=0.05')
    run('train.py', f'--dataset={data}', f'--out_dir={out}', *TINY, *options)
    return out, data


def test_an_answer_is_written_alone_and_a_chat_remembers_as_many_turns_as_were_trained_on(run, chatty):
    out, data = chatty
    model, made = ckpt.load_model(out)
    assert (model.config.turns, model.config.prefix_lm, model.config.document_token) == (2, True, 256)
    e, texts, answers = made.eot, ['hello 3', 'and 4', 'hello 5'], []
    for i, text in enumerate(texts):
        history = [part for pair in list(zip(texts, answers))[max(0, i - 1):i] for part in pair]  # one turn before this one
        ids = [e]
        for part in [*history, text]:
            ids += [*made.encode_to_numpy(part).tolist(), e]
        room = min(10, 64 - len(ids))
        written = model.generate([ids], room, temperature=0, stop_tokens=[e])[0][len(ids):]
        answers.append(made.decode([id_ for id_ in written if id_ != e]))
    assert all(answers)
    options = (f'--out_dir={out}', '--temperature=0', '--dtype=float32', '--max_new_tokens=10')
    shown = run('sample.py', *options, '--interactive', input='\n'.join(texts) + '\n').stdout
    assert shown == ''.join(f'{answer}\n{"-" * 15}\n' for answer in answers)
    alone = run('sample.py', *options, '--num_samples=1', f'--start={texts[0]}').stdout
    assert alone == f'{texts[0]}\n{answers[0]}\n{"-" * 15}\n'
    beams = run('sample.py', *options, '--num_samples=1', '--num_beams=2', f'--start={texts[0]}').stdout
    assert beams.startswith(f'{texts[0]}\n') and '<|endoftext|>' not in beams and 'score' in beams
    too_long = run('sample.py', *options, f'--start={"x" * 70}', code=2)
    assert 'start has 72 tokens: a source and its target have block_size = 64 together' in too_long.stderr


def test_finetuning_on_fifty_chats_teaches_their_form(run, prepare, tmp_path, text):
    """Weights that have read plain text answer in the form of 50 chats, to questions that they have not seen."""
    (tmp_path / 'text.txt').write_text(text[:60000], encoding='utf-8')
    run('data/text/prepare.py', f'--input={tmp_path}/text.txt', '--vocab_size=300', '--dataset=before')
    small = ('--device=cpu', '--n_layer=2', '--n_head=2', '--n_embd=64', '--position=rope', '--batch_size=8', '--eval_iters=4',
             '--gradient_accumulation_steps=1', '--warmup_iters=2', '--optimizer=muon', '--learning_rate=5e-3')
    run('train.py', '--dataset=before', f'--out_dir={tmp_path}/base', *small, '--block_size=64', '--max_iters=40')
    rng = random.Random(0)
    words = sorted({word for word in re.findall('[a-z]{4,9}', text)})
    questions = rng.sample(words, 58)
    lines = [{'messages': [{'role': 'user', 'content': f'What is {word}?'},
                           {'role': 'assistant', 'content': f'{word.upper()}: a word.'}]} for word in questions[:50]]
    data = prepare(lines, f'--init_from={tmp_path}/base', '--block_size=64', name='chats')
    assert bins.open_tokenizer(data).to_dict() == ckpt.load(tmp_path / 'base').tokenizer
    chat = ('--max_iters=120', f'--out_dir={tmp_path}/chat', *small[5:])
    run('train.py', f'--init_from={tmp_path}/base', f'--dataset={data}', *chat)
    tuned = ckpt.load(tmp_path / 'chat').model_config
    assert tuned['document_token'] == bins.open_tokenizer(data).eot and tuned['turns'] == 1  # packed chats do not see one another
    start = json.dumps([f'What is {word}?' for word in questions[50:]])
    shown = run('sample.py', f'--out_dir={tmp_path}/chat', f'--start={start}', '--num_samples=1', '--temperature=0').stdout
    answers = [part.strip().split('\n')[-1] for part in shown.split('-' * 15)[:-1]]
    assert len(answers) == 8 and all(re.fullmatch(r'[A-Z]+: a word\.', answer) for answer in answers), answers


def test_what_is_answered_does_not_depend_on_what_else_is_asked(run, chatty):
    """A long prompt ends where the context does; a short one beside it has more room."""
    import evaluate

    model, made = ckpt.load_model(chatty[0])
    long, short = ('hello ' * 9).strip(), 'hello 3'
    with torch.no_grad():
        model.lm_head.weight[made.eot] = 0  # so that it goes on
    for num_beams in (1, 2):
        options = [SimpleNamespace(batch_size=size, num_beams=num_beams, length_penalty=0.6) for size in (1, 2, 3)]
        turns = [([short], ''), ([long], ''), ([long[1:]], '')]
        alone, *together = [evaluate.write_targets(model, made, turns, option) for option in options]
        assert all(answers == alone for answers in together) and len(alone[0]) > 30 > len(alone[1])
    sample = ('sample.py', f'--out_dir={chatty[0]}', '--num_samples=1', '--temperature=0')
    plain = [run(*sample, f'--start={start}').stdout for start in (short, long)]
    assert run(*sample, f'--start={json.dumps([short, long])}').stdout == ''.join(plain)


def test_every_turn_of_a_chat_is_evaluated(chatty):
    import evaluate

    split = bins.open_dataset(chatty[1], 64).val
    expected = []
    for _, (a, b, c, d) in documents_of(chatty[1], 'val'):
        expected += [([a], b), ([a, b, c], d)]
    assert evaluate.read_turns(split, bins.open_tokenizer(chatty[1])) == expected and len(expected) > 2


def test_weights_whose_tokenizer_cannot_divide_pairs_are_refused(refused, trained, tmp_path):
    (tmp_path / 'a.tsv').write_text('a\tb\n')
    refused('data/pairs/prepare.py', f'--input={tmp_path}/a.tsv', f'--init_from={trained}', says=('(char) has no <|endoftext|>'))


def test_other_programs_know_what_is_read_both_ways(run, refused, chatty, tmp_path):
    refused('explain.py', f'--out_dir={chatty[0]}', '--start=a', says='prefix_lm = True')
    tuned = ('train.py', f'--init_from={chatty[0]}', f'--out_dir={tmp_path}/out', '--max_iters=1', '--device=cpu')
    run('data/text/prepare.py', f'--input={ROOT}/model.py', f'--init_from={chatty[0]}', '--dataset=plain')
    resume = ('train.py', '--init_from=resume', f'--out_dir={chatty[0]}')
    refused(*resume, '--prefix_lm=False', says=('prefix_lm = False', 'leave it out'))
    refused(*tuned, '--dataset=plain', says=('prefix_lm = True', 'give --prefix_lm=False'))
    run(*tuned, '--dataset=plain', '--prefix_lm=False', '--eval_iters=1', '--batch_size=2', '--gradient_accumulation_steps=1')
    assert not ckpt.load(tmp_path / 'out').model_config['prefix_lm']
    assert 'parameters' in run('tools/plan.py', 'config/scan.py', '--gpus=1').stdout


def test_commands_are_learnt_and_carried_out_that_were_never_seen(run, prepare):
    """Of 1,000 of SCAN's commands (walk, look, run, jump, left, right, twice, thrice, and, after) 9 in 10 are trained on."""
    simple = [pair for pair in commands() if not {'turn', 'around', 'opposite'} & set(pair[0].split())]
    data = prepare(random.Random(0).sample(simple, 1000), '--vocab_size=300', '--val_fraction=0.1', name='some-scan')
    small = ('--n_layer=2', '--n_embd=128', '--n_head=4', '--max_iters=300', '--eval_interval=1000', '--eval_iters=1',
             '--weight_decay=1')
    meanings = dict(simple)
    trained = run('train.py', 'config/scan.py', f'--dataset={data}', '--out_dir=out-some-scan', '--device=cpu', *small).stdout
    assert trained.endswith('sample.py --out_dir=out-some-scan --interactive\n')
    source, answer = re.findall(r'^  \| (.*)$', trained, re.MULTILINE)[-2:]  # shown at the last evaluation
    assert meanings[source] == answer
    said = run('tools/evaluate.py', '--out_dir=out-some-scan', '--show=5').stdout
    n, exact, chrf = re.search(r'pairs: (\d+) targets, beam 1: exact match ([\d.]+)%, chrF ([\d.]+)', said).groups()
    assert 80 < int(n) < 120 and float(exact) >= 99 and float(chrf) >= 99
    beam = run('tools/evaluate.py', '--out_dir=out-some-scan', '--num_beams=3', '--limit=20', '--batch_size=7').stdout
    assert 'pairs: 20 targets, beam 3: exact match 100.00%' in beam
    shown = re.findall(r'source: (.*)\ntarget: (.*)\nanswer: (.*)\n', said)
    assert len(shown) == 5 and all(meanings[source] == target for source, target, _ in shown)
    command = 'jump left thrice after walk'
    said = run('sample.py', '--out_dir=out-some-scan', f'--start={command}', '--num_samples=1', '--temperature=0').stdout
    assert said == f'{command}\n{meanings[command]}\n{"-" * 15}\n'


def test_scan_is_the_language_of_the_paper():
    pairs = dict(commands())
    assert len(commands()) == len(pairs) == 20910  # Lake & Baroni 2018, section 2
    assert pairs['jump'] == 'JUMP' and pairs['turn left'] == 'LTURN'  # their examples, figure 1
    assert pairs['jump left'] == 'LTURN JUMP' and pairs['jump around right'] == ' '.join(['RTURN JUMP'] * 4)
    assert pairs['turn left twice'] == 'LTURN LTURN' and pairs['jump thrice'] == 'JUMP JUMP JUMP'
    assert pairs['jump opposite left and walk thrice'] == 'LTURN LTURN JUMP WALK WALK WALK'
    assert pairs['jump opposite left after walk around left'] == ' '.join(['LTURN WALK'] * 4) + ' LTURN LTURN JUMP'
    assert max(len(actions.split()) for actions in pairs.values()) == 48
