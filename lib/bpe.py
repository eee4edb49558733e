"""Make a tokenizer from text, for the prepare scripts."""
import heapq
from array import array
from collections import Counter, defaultdict

from tqdm import tqdm

from lib.errors import require
from lib.tokenizer import (
    END_OF_TEXT,
    GPT2_PATTERN,
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    gpt2,
)


def make_tokenizer(kind, texts, vocab_size=None, end_of_text=False):
    """The tokenizer of --tokenizer. texts() iterates over the text to train it on.

    end_of_text: with `<|endoftext|>`, which bpe and gpt2 always have. Raises UserError.
    """
    if kind == 'gpt2':
        return gpt2()
    if kind == 'byte':
        return ByteTokenizer(end_of_text)
    return train_char(texts(), end_of_text) if kind == 'char' else train_bpe(texts(), vocab_size)


def train_char(texts, end_of_text=False):
    """A CharTokenizer of the characters in texts, sorted."""
    characters = set()
    for text in texts:
        characters.update(text)
    require(characters, 'the text is empty')
    return CharTokenizer(''.join(sorted(characters)), end_of_text)


def train_bpe(texts, vocab_size, max_characters=16 * 2**20):
    """A BPETokenizer of vocab_size ids (256 bytes, merges, `<|endoftext|>`), trained on the first
    max_characters of texts.

    Sennrich et al. 2016, algorithm 1, on bytes within GPT-2's words: each merge joins the most
    frequent pair of tokens (ties: the lowest ids). It visits only the places of that pair, so that
    the time is about linear in the text, with and without blanks. vocab_size = None: 4096, or as
    many as the text has pairs for. Raises UserError if it has too few for the vocab_size given.
    """
    at_most = vocab_size is None
    if at_most:
        vocab_size = 4096
    require(257 <= vocab_size <= 2**20, f'vocab_size = {vocab_size}: bpe needs at least 257 (256 '
                                        f'bytes and {END_OF_TEXT}) and at most {2**20:,}')
    words = Words(count_words(texts, max_characters))
    heap = [(-count, pair) for pair, count in words.pairs.items()]
    heapq.heapify(heap)
    tokens = [bytes([b]) for b in range(256)]
    bar = tqdm(total=vocab_size - 1, initial=len(tokens), desc='train bpe', unit='token',
               disable=None, leave=False)
    while len(tokens) < vocab_size - 1:
        while heap and -heap[0][0] != words.pairs[heap[0][1]]:
            heapq.heappop(heap)  # outdated: the new count is in the heap too
        if not heap or heap[0][0] == 0:
            bar.close()
            if at_most:
                break
            require(False, f'vocab_size = {vocab_size}: the text has pairs for {len(tokens) + 1} '
                           f'tokens only; ask for at most that')
        left, right = heapq.heappop(heap)[1]
        for pair in words.merge(left, right, len(tokens)):
            heapq.heappush(heap, (-words.pairs[pair], pair))
        tokens.append(tokens[left] + tokens[right])
        bar.update()
    bar.close()
    return BPETokenizer('bpe', GPT2_PATTERN, tokens)


class Words:
    """Different words end to end, as linked tokens. pairs: how often each pair of neighbors occurs
    in the text."""

    def __init__(self, counts):
        """counts: {word: how often}. Tokens are bytes at first."""
        self.frequency = list(counts.values())
        # by byte: the token that begins there, -1 within a token; its word; its neighbors' places
        self.token, self.word = array('i'), array('i')
        self.before, self.after = array('i'), array('i')
        for number, text in enumerate(counts):
            data = text.encode('utf-8')
            first, end = len(self.token), len(self.token) + len(data)
            self.token.extend(data)
            self.word.extend([number] * len(data))
            self.before.extend([-1, *range(first, end - 1)])
            self.after.extend([*range(first + 1, end), -1])
        self.pairs, self.places = Counter(), defaultdict(lambda: array('i'))
        for i, j in enumerate(self.after):
            if j >= 0:
                pair = self.token[i], self.token[j]
                self.pairs[pair] += self.frequency[self.word[i]]
                self.places[pair].append(i)

    def merge(self, left, right, new):
        """Replace the pair by the token new everywhere; returns the pairs whose counts changed."""
        token, before, after, places = self.token, self.before, self.after, self.places
        changed = Counter()
        for i in sorted(places.pop((left, right))):  # from left to right
            j = after[i]
            if token[i] != left or j < 0 or token[j] != right:
                continue  # an earlier merge has taken one of the two
            n, h, k = self.frequency[self.word[i]], before[i], after[j]
            token[i], token[j], after[i] = new, -1, k
            if h >= 0:
                changed[token[h], left] -= n
                changed[token[h], new] += n
                places[token[h], new].append(h)
            if k >= 0:
                changed[right, token[k]] -= n
                changed[new, token[k]] += n
                places[new, token[k]].append(i)
                before[k] = i
        changed = {pair: difference for pair, difference in changed.items() if difference}
        for pair, difference in changed.items():
            self.pairs[pair] += difference
        del self.pairs[left, right]
        changed.pop((left, right), None)
        return changed


def count_words(texts, max_characters):
    """{word: how often} in the first max_characters of texts, split by GPT2_PATTERN."""
    import regex  # comes with tiktoken

    counts, left = Counter(), max_characters
    for text in texts:
        counts.update(regex.findall(GPT2_PATTERN, text[:left]))
        left -= len(text)
        if left <= 0:
            break
    return counts
