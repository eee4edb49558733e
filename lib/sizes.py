"""Numbers about the model of a config, before any run."""
from configurator import GPTConfig
from lib import bins
from lib.memory import Sizes
from lib.resume import choose_model_config


def config_sizes(config, device, vocab_size=None):
    """The Sizes of a TrainConfig's model. vocab_size: None: the data set's, or GPT-2's if it is not
    prepared. Raises UserError."""
    if vocab_size is None:
        tokenizer = bins.open_tokenizer(bins.find_dataset(config.dataset))
        vocab_size = tokenizer.vocab_size if tokenizer else 50257
    shape = choose_model_config(config, given=set(), checkpoint=None)
    # which token separates documents does not matter here, only whether one does
    eot_token = 0 if config.doc_mask or config.prefix_lm else None
    return Sizes(GPTConfig(**shape, vocab_size=vocab_size, eot_token=eot_token), device)
