"""Make a tokenizer from text, for the prepare scripts."""
import heapq
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
    """A BPETokenizer of vocab_size ids (256 bytes, merges, `<|endoftext|>`), trained on about the
    first max_characters of texts.

    Sennrich et al. 2016, algorithm 1, on bytes within GPT-2's words: each merge joins the most
    frequent pair of tokens (ties: the lowest ids) and visits only the words that hold it. Raises
    UserError if the text has too few pairs.
    """
    import regex  # comes with tiktoken

    require(vocab_size >= 257,
            f'vocab_size = {vocab_size}: bpe needs at least 257 (256 bytes and {END_OF_TEXT})')
    counts, n_characters = Counter(), 0
    for text in texts:
        counts.update(regex.findall(GPT2_PATTERN, text))
        n_characters += len(text)
        if n_characters >= max_characters:
            break
    words = [list(word.encode('utf-8')) for word in counts]
    frequency = list(counts.values())
    pairs, words_with = Counter(), defaultdict(set)
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pairs[pair] += frequency[i]
            words_with[pair].add(i)
    heap = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(heap)
    tokens = [bytes([b]) for b in range(256)]
    bar = tqdm(total=vocab_size - 1, initial=len(tokens), desc='train bpe', unit='token')
    while len(tokens) < vocab_size - 1:
        while heap and -heap[0][0] != pairs[heap[0][1]]:
            heapq.heappop(heap)  # outdated: the new count is in the heap too
        if not heap or heap[0][0] == 0:
            bar.close()
            require(False, f'vocab_size = {vocab_size}: the text has pairs for {len(tokens) + 1} '
                           f'tokens only; ask for at most that')
        pair = heapq.heappop(heap)[1]
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        changed = Counter()
        for i in words_with.pop(pair):
            old = words[i]
            words[i] = merge(old, pair, len(tokens) - 1)
            for p in zip(old, old[1:]):
                changed[p] -= frequency[i]
            for p in zip(words[i], words[i][1:]):
                changed[p] += frequency[i]
                words_with[p].add(i)
        for p, difference in changed.items():
            if difference:
                pairs[p] += difference
                heapq.heappush(heap, (-pairs[p], p))
        del pairs[pair]
        bar.update()
    bar.close()
    return BPETokenizer('bpe', GPT2_PATTERN, tokens)


def merge(word, pair, new):
    """word with each occurrence of pair replaced by the token new."""
    merged, j = [], 0
    while j < len(word):
        both = j + 1 < len(word) and (word[j], word[j + 1]) == pair
        merged.append(new if both else word[j])
        j += 2 if both else 1
    return merged
