"""Where prepare scripts get text: files in pieces, tiny Shakespeare, Hugging Face's hub."""
import contextlib
import hashlib
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

from lib.bpe import make_tokenizer
from lib.download import download
from lib.errors import UserError, first_line, os_errors, require
from lib.files import find, open_text, read_text
from lib.tokenizer import END_OF_TEXT, GPT2_PATTERN, gpt2
from lib.write import Piece, write_dataset

PIECE_CHARACTERS = 2**20  # each piece of a file is tokenized by one thread
LONGEST_WORD = 2**12  # characters: longer ones may be cut, as a text without blanks must be


@contextlib.contextmanager
def regular_file(path):
    """The path of a file with the content of what a user has given as --input: a pipe, which can be
    read only once (-: standard input), is copied into a temporary file. Raises UserError."""
    found = find(path)
    if path != '-':
        require(os.path.exists(found), f'--input={path}: there is no such file')
        require(not found.is_dir(), f'--input={path} is a folder: name a file')
        if found.is_file():
            yield found
            return
        stdin = str(found) in ('/dev/stdin', '/dev/fd/0', '/proc/self/fd/0')
        require(stdin or not found.is_char_device(), f'--input={path} is a device: name a file')
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / f'input{found.suffix}'
        with os_errors(f'--input={path}'), open(copy, 'wb') as target:
            # Windows has no /dev/stdin
            with sys.stdin.buffer if path == '-' else open(found, 'rb') as source:
                shutil.copyfileobj(source, target)
        try:
            yield copy
        except UserError as error:
            raise UserError(str(error).replace(str(copy), f'--input={path}')) from None


def read_pieces(path, size=PIECE_CHARACTERS, cuts_anywhere=False):
    """The text of a file in pieces of about `size` characters, whose tokens are those of the whole
    (but LONGEST_WORD). cuts_anywhere: for characters and bytes. Raises UserError."""
    rest = ''
    with open_text(path) as file:
        while block := file.read(size):
            text = rest + block
            end = 0 if cuts_anywhere else cut_before_blank(text)
            if cuts_anywhere or not end and len(text) >= LONGEST_WORD:
                end = cut_before_end_of_text(text)
            if end:
                yield text[:end]
            rest = text[end:]
    if rest:
        yield rest


def cut_before_blank(text):
    """The last position where the patterns of lib/tokenizer.py cut anyway, 0 if there is none: a
    word takes the space before it, and white space in a token comes first, but for the line ends
    after GPT-4's punctuation."""
    end = text.rfind(' ', 1, -1)
    while end > 0 and (text[end - 1].isspace() or text[end + 1].isspace()):
        end = text.rfind(' ', 1, end)
    if end < 0:
        cuts = re.finditer(r'\S(?=[ \t])|\S\n(?=\S)', text)
        end = max((match.end() for match in cuts), default=0)
    return end


def cut_before_end_of_text(text):
    """The end of the text, or where a `<|endoftext|>` begins that may be cut off."""
    start = text.rfind('<', max(0, len(text) - len(END_OF_TEXT) + 1))
    return start if start >= 0 and END_OF_TEXT.startswith(text[start:]) else len(text)


def split_at_end(texts, total_bytes, val_fraction=0.1, ordinary=False, cuts_anywhere=True):
    """(text, ends_document), ... -> Pieces: the last val_fraction of the bytes is the val split.
    ordinary: `<|endoftext|>` in the text is plain text. cuts_anywhere: else not within a word."""
    boundary, done = int(total_bytes * (1 - val_fraction)), 0
    for text, ends_document in texts:
        raw = text.encode('utf-8')
        if done < boundary < done + len(raw):
            cut = len(raw[:boundary - done].decode('utf-8', errors='ignore'))
            first, end = 0, len(text)  # of the document that is cut
            start = text.rfind(END_OF_TEXT, 0, cut + len(END_OF_TEXT) - 1)
            if start >= 0 and not ordinary:
                first = start + len(END_OF_TEXT)
                cut = max(cut, first)  # not through a separator
            if not ordinary and END_OF_TEXT in text[cut:]:
                end = text.index(END_OF_TEXT, cut)
            if not cuts_anywhere:
                cut = first + start_of_word(text[first:end], cut - first)
            yield Piece('train', text[:cut])
            yield Piece('val', text[cut:], ends_document)
        else:
            split = 'train' if done < boundary else 'val'
            yield Piece(split, text, ends_document)
        done += len(raw)


def start_of_word(text, cut):
    """cut, or the beginning of the word of GPT-2's pattern that it would cut in two, unless that is
    LONGEST_WORD characters before."""
    import regex  # comes with tiktoken

    before = cut_before_blank(text[:cut]) if cut > 1 else 0
    for word in regex.finditer(GPT2_PATTERN, text, pos=before):
        if word.end() >= cut:
            may_cut = word.end() == cut or cut - word.start() >= LONGEST_WORD
            return cut if may_cut else word.start()
    return cut


def read_shakespeare(path):
    """char-rnn's tiny Shakespeare, 1,115,394 characters, downloaded to path if it is missing."""
    url = ('https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/'
           'input.txt')
    download(url, path,
             sha256='86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed',
             advice='put the file there by hand, or start with python train.py '
                    'config/quickstart.py, which downloads nothing')
    return read_text(path)


def prepare_shakespeare(folder, tokenizer_kind):
    """Tiny Shakespeare into bins in folder, with nanoGPT's split."""
    text = read_shakespeare(folder / 'input.txt')
    size = len(text.encode('utf-8'))
    tokenizer = make_tokenizer(tokenizer_kind, lambda: [text])
    write_dataset(folder, split_at_end([(text, False)], size), tokenizer, 'tiny shakespeare', size)


def prepare_hub(folder, path, name, max_tokens, expected_tokens=None):
    """A data set of Hugging Face's hub, or a local folder of parquet or JSON lines, into bins in
    folder with GPT-2's BPE; streams in bounded memory."""
    pieces, source = hub_documents(path, name)
    write_dataset(folder, pieces, gpt2(), source, None, max_tokens, expected_tokens)


def hub_documents(path, name, val_every=2000):
    """(function for write_dataset that makes Pieces from a state, the name of the source).

    Every val_every-th document goes to the val split. Raises UserError if the optional package
    datasets is missing.
    """
    try:
        from datasets import load_dataset  # optional
    except ImportError:
        raise UserError('streaming from the hub needs the optional package datasets: '
                        'pip install datasets') from None

    def pieces(state):
        try:
            where = str(find(path)) if files else path
            documents, first = load_dataset(where, name, split='train', streaming=True), 0
            if state:
                documents.load_state_dict(state['documents'])
                first = state['number']
            for i, document in enumerate(documents, first):
                require(isinstance(document.get('text', 0), str | None),
                        f'{path}: its documents have {", ".join(document)}, but no text under '
                        f'"text"')
                state = {'documents': documents.state_dict(), 'number': i + 1}
                yield Piece('train' if i % val_every else 'val', document['text'] or '',
                            ends_document=True, state=state)
        except UserError:
            raise
        except Exception as error:  # datasets raises anything: no network, no such name, ...
            raise UserError(f'{path}: cannot be read: {type(error).__name__}: {first_line(error)}; '
                            f'check the network and the name') from None

    # a local folder with other files is another data set
    files = [(p.name, p.stat().st_size, p.stat().st_mtime_ns)
             for p in sorted(find(path).rglob('*')) if p.is_file()]
    source = path
    if name is not None:
        source += f', {name}'
    if files:
        source += f', files {hashlib.sha256(repr(files).encode()).hexdigest()[:16]}'
    return pieces, source
