"""Pairs and chats as they are found: TSV, JSON Lines and arrays; the errors for bad input."""

import gzip
import json
import re

import pytest

from data.pairs.prepare import read_documents
from helpers import random_pairs
from helpers import read_documents as read_bins


def chat(*texts, roles=('user', 'assistant'), keys=('role', 'content')):
    return [dict(zip(keys, (roles[i % 2], text))) for i, text in enumerate(texts)]


def human(*texts):
    return {'conversations': chat(*texts, roles=('human', 'gpt'), keys=('from', 'value'))}


def parts(*texts):
    return [{'type': 'text', 'text': text} for text in texts]


EXAMPLES = [
    ({'prompt': 'a', 'response': 'b', 'id': 3}, ['a', 'b']),
    ({'prompt': ' a ', 'completion': 'b\n'}, ['a', 'b']),
    ({'question': 'a', 'answer': 'b'}, ['a', 'b']),
    ({'input': 'a', 'output': 'b'}, ['a', 'b']),
    ({'instruction': 'a', 'input': 'b', 'output': 'c'}, ['a\n\nb', 'c']),
    ({'instruction': 'a', 'input': '', 'output': 'c'}, ['a', 'c']),
    ({'instruction': 'a', 'output': 'c'}, ['a', 'c']),
    ({'messages': chat('a', 'b')}, ['a', 'b']),
    ({'messages': chat('a', 'b', 'c', 'd')}, ['a', 'b', 'c', 'd']),
    (chat('a', 'b', 'c', 'd'), ['a', 'b', 'c', 'd']),
    (human('a', 'b', 'c', 'd'), ['a', 'b', 'c', 'd']),
    ({'messages': [{'role': 'system', 'content': 's'}, *chat('a', 'b')]}, ['s\n\na', 'b']),
    (
        {'messages': [*chat('a'), *chat('b', 'c'), *chat('d', roles=('assistant',))]},
        ['a\n\nb', 'c\n\nd'],
    ),
    ({'messages': chat(parts('a'), parts('b ', 'c'))}, ['a', 'b c']),
    ({'messages': chat('à 日本', '😀')}, ['à 日本', '😀']),
    ({'instruction': 'c', 'output': 'd', 'history': [['a', 'b']]}, ['a', 'b', 'c', 'd']),
    ({'prompt': 'c', 'response': 'd', 'history': [], 'tools': '[]', 'id': 3}, ['c', 'd']),
    (
        {'instruction': 'c', 'input': 'x', 'output': 'd', 'history': [['a', 'b']], 'system': 's'},
        ['s\n\na', 'b', 'c\n\nx', 'd'],
    ),
    (
        {'messages': [{'role': 'user', 'content': 'a'},
                      {'role': 'assistant', 'content': 'b', 'tool_calls': None}]},
        ['a', 'b'],
    ),
]


def write(path, text):
    raw = text.encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == '.gz' else raw)
    return path


@pytest.mark.parametrize('ensure_ascii', [True, False])
def test_pairs_read_every_format_from_lines_and_arrays(tmp_path, ensure_ascii):
    def dump(value, **options):
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    examples = [example for example, _ in EXAMPLES]
    expected = [document for _, document in EXAMPLES]
    lines = '\n\n'.join(map(dump, examples)) + '\n'
    texts = {
        'lines.jsonl': lines,
        'lines.json': lines.rstrip(),
        'windows.jsonl': '\ufeff' + lines.replace('\n', '\r\n'),
        'lines.jsonl.gz': lines,
        'array.json': dump(examples),
        'array.jsonl': dump(examples) + '\n',
        'pretty.json': dump(examples, indent=2),
        'pretty.JSON.gz': '\ufeff' + dump(examples, indent=1).replace('\n', '\r\n'),
    }
    for name, text in texts.items():
        found = list(read_documents(write(tmp_path / name, text)))
        assert [document for _, document in found] == expected, name
        kind = 'line' if 'line' in name or 'windows' in name else 'item'
        step = 2 if kind == 'line' else 1  # every other line is blank
        assert [place for place, _ in found] == [
            f'{kind} {i * step + 1}' for i in range(len(expected))
        ], name


@pytest.mark.parametrize('indent', [None, 1])
def test_pairs_read_files_of_bare_chats(tmp_path, indent):
    """A file with one chat is itself an array, of messages."""
    one, two = chat('a', 'b'), chat('c', 'd', 'e', 'f')
    expected = [['a', 'b'], ['c', 'd', 'e', 'f']]
    for values in ([one], [one, two], [two, one, two]):
        texts = {'array.json': json.dumps(values, indent=indent)}
        texts['lines.jsonl'] = ''.join(json.dumps(value) + '\n' for value in values)
        if len(values) == 1:
            texts['one.json'] = json.dumps(one, indent=indent)
        for name, text in texts.items():
            found = read_documents(write(tmp_path / name, text))
            documents = [document for _, document in found]
            assert documents == [expected[len(value) // 4] for value in values], name


def test_pairs_prepare_reads_alpaca_and_compressed_tsv(run, prepare_pairs, clone, tmp_path):
    pairs = random_pairs(30)
    plain = prepare_pairs(pairs, '--tokenizer=char', '--block_size=256')
    expected = [read_bins(plain, split) for split in ('train', 'val')]
    tsv = ''.join(f'\t{source}\t{target}\r\n'[1:] for source, target in pairs)
    alpaca = [{'instruction': a, 'input': '', 'output': b} for a, b in pairs]
    options = ('--tokenizer=char', '--block_size=256', '--dataset=found')
    write(tmp_path / 'pairs.tsv.gz', '\ufeff' + tsv)
    write(tmp_path / 'alpaca.json', json.dumps(alpaca, indent=4))
    for name in ('pairs.tsv.gz', 'alpaca.json'):
        home = {'HOME': str(tmp_path)}
        run('data/pairs/prepare.py', f'--input=~/{name}', *options, env=home)
        found = [read_bins(clone / 'data' / 'found', split) for split in ('train', 'val')]
        assert found == expected


MESSAGES = '{"messages": [{"role": "user", "content": "a"}, %s]}'


@pytest.mark.parametrize(
    'lines, suffix, says',
    [
        (['a\tb', 'no tab'], 'tsv', 'line 2: there is no tab'),
        (['a\tb', 'a\t '], 'tsv', 'line 2: a side is empty'),
        (['\tb'], 'tsv', 'line 1: a side is empty'),
        ([b'a\tb', b'\xff\tb'], 'tsv', 'byte 4 is not UTF-8'),
        (['{"prompt": "a", "response": "b"}', '', '{"prompt": '], 'jsonl', 'line 3: not JSON'),
        (['[' * 200000], 'jsonl', 'line 1: not JSON: '),
        (['{"prompt": "a", "response": "b"}', '[' * 200000], 'jsonl', 'line 2: not JSON: '),
        (['{"a": ' * 200000], 'json', 'line 1: not JSON: '),
        (['{"prompt": "a", "response": "b"}', '{"a": ' + '9' * 5000 + '}'], 'json', 'line 2: not'),
        (['[', '{"prompt": "a",', '"response": "b"}', '{"prompt"'], 'json', 'line 4: not JSON: '),
        (['[{"prompt": "a", "response": "b"}, {"prompt": "a"}]'], 'json', 'item 2: give an object'),
        (['[{"prompt": "a", "response": "\\ud83d"}]'], 'json', 'item 1: not JSON'),
        (['[1, 2]'], 'json', 'item 1: give an object'),
        (['[]'], 'json', 'there is no pair in it'),
        (['"a\\tb"'], 'jsonl', 'line 1: give an object'),
        (['a b', '{"prompt": "a", "response": "b"}'], 'txt', 'line 1: there is no tab'),
        (['{"prompt": "a", "response": "b"}', 'x'], 'txt', 'line 2: not JSON'),
        (['{"prompt": "a", "response": "b", "history": [["a"]]}'], 'json', 'list of pairs'),
        (['{"prompt": "a", "response": "b", "history": 3}'], 'json', 'list of pairs'),
        (['{"prompt": "a", "response": "b", "history": [["a", 3]]}'], 'json', 'list of pairs'),
        (['{"prompt": "a", "response": "b", "history": "ab"}'], 'json', 'list of pairs'),
        (['{"instruction": "a", "input": 3, "output": "b"}'], 'jsonl', 'input is not a text'),
        ([MESSAGES % '{"role": "assistant", "content": 3}'], 'jsonl', 'neither a text nor'),
        (
            [MESSAGES % '{"role": "assistant", "content": [{"type": "image_url", "text": "a"}]}'],
            'jsonl',
            "line 1: a part of a message ('image_url') is not",
        ),
        ([MESSAGES % '{"from": "bing", "value": "b"}'], 'json', "role 'bing' is none of system"),
        (['{"prompt": "a", "response": "b \\ud83d"}'], 'jsonl', 'line 1: not JSON'),
        (['{"prompt": "a"}'], 'jsonl', 'line 1: give an object with texts under'),
        (['{"prompt": "a", "response": " "}'], 'jsonl', 'line 1: a side is empty'),
        (
            [MESSAGES % '{"role": "bot", "content": "b"}'],
            'jsonl',
            "line 1: role 'bot' is none of system, user, assistant",
        ),
        (
            [MESSAGES % '{"role": "user", "content": "b"}'],
            'jsonl',
            "line 1: the last message is not the assistant's",
        ),
        (
            [MESSAGES % '{"role": "assistant", "content": ""}'],
            'jsonl',
            'line 1: the content of a message (assistant) is empty',
        ),
        (
            ['{"messages": [{"role": "assistant", "content": "a"}]}'],
            'jsonl',
            'nothing it answers',
        ),
        (
            ['{"messages": [{"role": "user"}]}'],
            'jsonl',
            'line 1: a message is {"role": text, "content": text}',
        ),
        (['{"messages": []}'], 'jsonl', 'line 1: the last message'),
        (['', ' '], 'tsv', 'there is no pair in it'),
        (
            [f'{"a" * 99}\tb', f'{"c" * 40}\td'],
            'tsv',
            'no pair is left: 2 longer than block_size = 20',
        ),
        (['a\tb', 'a\tc'], 'tsv', 'no pair is left to train on'),
    ],
)
def test_pairs_report_invalid_line(refused, clone, tmp_path, lines, suffix, says):
    path = tmp_path / f'bad.{suffix}'
    path.write_bytes(
        b'\n'.join(line if isinstance(line, bytes) else line.encode() for line in lines)
    )
    options = ('--tokenizer=byte', '--block_size=20', '--dataset=bad')
    refused('data/pairs/prepare.py', f'--input={path}', *options, says=(str(path), says))
    assert not (clone / 'data' / 'bad' / 'train.bin').exists()


def test_what_is_not_text_is_left_out_and_said(run, clone, tmp_path):
    """Calls of tools, their results and images: the rest of such a chat would teach to guess."""
    call = {'role': 'assistant', 'content': 'b', 'tool_calls': [{'id': 1}]}
    lines = [
        {'messages': [*chat('a'), call]},
        {'messages': [*chat('a'), call | {'content': None}]},
        *({'messages': [*chat('a', 'b'), {'role': role, 'content': 'c'}, *chat('d', 'e')]}
          for role in ('tool', 'function', 'ipython')),
        human('a', 'b') | {'tools': '[{"name": "x"}]'},
        {'instruction': 'a', 'output': 'b', 'images': ['x.png']},
    ]  # fmt: skip
    good = [{'prompt': f'a{i}', 'response': 'b'} for i in range(60)]
    path = tmp_path / 'x.jsonl'
    path.write_text(''.join(json.dumps(line) + '\n' for line in lines + good))
    result = run('data/pairs/prepare.py', f'--input={path}', '--tokenizer=byte', '--dataset=tools')
    assert 'left out: 7 of 67 examples (line 1: it has tool_calls, which cannot' in result.stdout
    left_out = []
    assert len(list(read_documents(path, left_out))) == 60
    assert [reason.split(': ')[1].split(' ')[0:3] for reason in left_out] == [
        ['it', 'has', 'tool_calls,'], ['it', 'has', 'tool_calls,'], ['role', "'tool'", 'is'],
        ['role', "'function'", 'is'], ['role', "'ipython'", 'is'], ['it', 'has', 'tools,'],
        ['it', 'has', 'images,'],
    ]  # fmt: skip


@pytest.mark.parametrize('kind', ['lines', 'array', 'pretty', 'tsv', 'brackets'])
def test_json_is_recognized_in_a_pipe(run, clone, tmp_path, kind):
    pairs = [(f'[a{i}', f'b{i}]') for i in range(40)]
    examples = [{'prompt': a, 'response': b} for a, b in pairs]
    text = {
        'lines': '\n' + ''.join(json.dumps(example) + '\n' for example in examples),
        'array': json.dumps(examples),
        'pretty': json.dumps(examples, indent=1),
        'tsv': ''.join(f'{a[1:]}\t{b}\n' for a, b in pairs),
        'brackets': ''.join(f'{a}\t{b}\n' for a, b in pairs),
    }[kind]
    (tmp_path / 'x').write_text(text)
    options = ('--tokenizer=byte', '--dataset=piped')
    with open(tmp_path / 'x') as stdin:
        run('data/pairs/prepare.py', '--input=-', *options, stdin=stdin)
    found = [d for split in ('train', 'val') for _, d in read_bins(clone / 'data/piped', split)]
    assert sorted(found) == sorted([a[1:] if kind == 'tsv' else a, b] for a, b in pairs)


def test_a_single_one_is_not_said_in_the_plural(run, clone, tmp_path):
    examples = [{'prompt': a, 'response': b} for a, b in (('a', ''), ('a', 'b'), ('c', 'b'))]
    (tmp_path / 'x.json').write_text(json.dumps(examples))
    options = ('--tokenizer=byte', '--val_fraction=0.5', '--dataset=one')
    pairs = run('data/pairs/prepare.py', f'--input={tmp_path / "x.json"}', *options).stdout
    assert 'left out: 1 of 3 examples' in pairs and '1 pair to train on' in pairs
    folder = tmp_path / 'notes'
    folder.mkdir()
    (folder / 'a.txt').write_text('to be or not to be ' * 9)
    (folder / 'b.bin').write_bytes(bytes(9))
    options = ('--tokenizer=char', '--dataset=one')
    text = run('data/text/prepare.py', f'--input={folder}', *options).stdout
    assert 'left out: 1 file, the first one: ' in text
    for output in (pairs, text):
        assert not re.search(r'\b1 \w+s\b', output), output
