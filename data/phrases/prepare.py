"""Phrases: short English sentences and their Italian translations, from a grammar of our own.

Who does what to whom, how much or when: `I love you very much` -> `Ti amo molto`. The order of the
words changes, verbs agree with a subject that Italian leaves out. Nothing is downloaded.

    python data/phrases/prepare.py
"""
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository

from configurator import ValFraction, configure
from lib.bpe import train_bpe
from lib.errors import user_errors
from lib.write_pairs import write_pairs

# English subject, Italian one (pronouns are left out), person: 0 to 2 singular, 3 to 5 plural
SUBJECTS = (('I', '', 0), ('you', '', 1), ('he', '', 2), ('she', '', 2), ('we', '', 3),
            ('they', '', 5), ('Anna', 'Anna', 2), ('Marco', 'Marco', 2))
VERBS = {
    'love': 'amo ami ama amiamo amate amano',
    'help': 'aiuto aiuti aiuta aiutiamo aiutate aiutano',
    'thank': 'ringrazio ringrazi ringrazia ringraziamo ringraziate ringraziano',
    'see': 'vedo vedi vede vediamo vedete vedono',
    'know': 'conosco conosci conosce conosciamo conoscete conoscono',
    'want': 'voglio vuoi vuole vogliamo volete vogliono',
    'hear': 'sento senti sente sentiamo sentite sentono',
    'call': 'chiamo chiami chiama chiamiamo chiamate chiamano',
}
VERY_MUCH = ('love', 'help', 'thank')  # verbs with a degree
# English object, Italian one, whether it is a pronoun: these come before the verb
OBJECTS = (('me', 'mi', True), ('you', 'ti', True), ('him', 'lo', True), ('her', 'la', True),
           ('us', 'ci', True), ('them', 'li', True), ('Anna', 'Anna', False),
           ('Marco', 'Marco', False), ('the doctor', 'il medico', False),
           ('the children', 'i bambini', False))
REFLEXIVE = {('I', 'me'), ('I', 'us'), ('you', 'you'), ('we', 'me'), ('we', 'us'),
             ('Anna', 'Anna'), ('Marco', 'Marco')}
TIMES = (('', ''), ('today', 'oggi'), ('every day', 'ogni giorno'))
DEGREES = (('very much', 'molto'), ('a lot', 'molto'))


def phrases():
    """[(English, Italian)]: statements, negations and questions; no English sentence twice."""
    pairs = []
    for subject, verb, thing in itertools.product(SUBJECTS, VERBS, OBJECTS):
        if (subject[0], thing[0]) in REFLEXIVE:
            continue
        for adverb in TIMES + DEGREES * (verb in VERY_MUCH):
            pairs += [translate(kind, subject, verb, thing, adverb)
                      for kind in ('statement', 'negation', 'question')]
    return pairs


def translate(kind, subject, verb, thing, adverb):
    """One sentence in both languages; the arguments are rows of the tables above."""
    (name, nome, person), (object_, oggetto, is_pronoun), (adverb, avverbio) = (
        subject, thing, adverb)
    form = VERBS[verb].split()[person]
    # pronoun, verb, `molto`, object, time: `Ti amo molto`, `Amo molto Anna`, `Vedo Anna oggi`
    after = [avverbio, oggetto] if avverbio == 'molto' else [oggetto, avverbio]
    clause = [oggetto, form, avverbio] if is_pronoun else [form, *after]
    does = 'does' if person == 2 else 'do'
    if kind == 'statement':
        english = [name, verb + 's' * (person == 2), object_, adverb]
        italian = [nome, *clause]
    elif kind == 'negation':
        english = [name, does, 'not', verb, object_, adverb]
        italian = [nome, 'non', *clause]
    else:
        english = [does, name, verb, object_, adverb]
        italian = [nome, *clause]
    end = '?' * (kind == 'question')
    return sentence(english) + end, sentence(italian) + end


def sentence(words):
    """Words, some of them empty, with a capital at the beginning."""
    text = ' '.join(filter(None, words))
    return text[0].upper() + text[1:]


@dataclass
class Config:
    val_fraction: ValFraction = 0.2  # of the sentences, by hash: the model does not see them


def main(config):
    documents = [(f'line {n}', parts) for n, parts in enumerate(phrases(), 1)]
    tokenizer = train_bpe((part for _, parts in documents for part in parts), vocab_size=400)
    write_pairs(documents, tokenizer, 'Phrases', 'phrases', block_size=64,
                val_fraction=config.val_fraction)


if __name__ == '__main__':
    with user_errors():
        main(configure(Config)[0])
