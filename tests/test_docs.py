"""What README and docs say to type works, and what is generated in docs is current."""

import re

import torch

import reference
from configurator import configure, key_types
from helpers import ROOT
from lib.recipe import read_train_config
from model import GPT, GPTConfig
from pages import PAGES, commands, page, prose
from tools import plan, runs, scale, sweep

PARSERS = {'train.py': read_train_config, 'tools/plan.py': plan.read_command,
           'tools/scale.py': scale.read_command, 'tools/sweep.py': sweep.read_command}
ALL_COMMANDS = [command for name in PAGES for command in commands(name)]


def parse(script, arguments):
    """Raises UserError, SystemExit after --help."""
    # the config file of a run that does not exist here
    arguments = [re.sub(r'^out-[\w-]+/config.py$', 'config/quickstart.py', word)
                 for word in arguments]
    if script in PARSERS:
        PARSERS[script](arguments)
    elif script == 'tools/runs.py':  # words without -- are folders
        configure(runs.Config, [word for word in arguments if word.startswith('-')])
    else:
        configure(reference.config_class(ROOT / script), arguments)


def test_keys_and_values_of_all_commands_are_right(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert len(ALL_COMMANDS) > 100
    for command in ALL_COMMANDS:
        try:
            parse(command.script, command.arguments)
        except SystemExit:
            assert '--help' in command.arguments, command
        except Exception as error:
            raise AssertionError(f'{command}: {error}') from error


def test_flags_in_prose_exist():
    scripts = [path for pattern in reference.PROGRAMS for path in ROOT.glob(pattern)]
    known = {key for path in scripts for key in key_types(reference.config_class(path))}
    known |= {'help', 'key', 'switch', 'nproc_per_node', 'rdzv_id', 'max', 'shutdown', 'version'}
    for name in PAGES:
        for flag in re.findall(r'`--(\w+)', prose(name)):
            assert flag in known, f'{name}: --{flag}'


def test_config_reference_is_current():
    assert page('docs/config.md') == reference.render(), 'run python tools/reference.py'


def test_config_reference_has_every_key():
    keys = set(re.findall(r'^\| `(\w+)` \| `', page('docs/config.md'), re.M))
    for pattern in reference.PROGRAMS:
        for path in ROOT.glob(pattern):
            assert key_types(reference.config_class(path)).keys() <= keys, path


def test_sections_name_stops_of_the_course():
    lines = re.findall(r'^\*Course: (.+)\.\*$', page('docs/model.md'), re.M)
    stops = [stop for line in lines for stop in re.split('; | or ', line)]
    course = page('web/course.js')
    assert len(stops) > 15 and all(f"'{stop}'" in course for stop in stops)


def test_parameters_have_the_names_and_shapes_of_the_page(monkeypatch):
    monkeypatch.chdir(ROOT)
    config, _ = read_train_config(['config/quickstart.py'])
    keys = {key: getattr(config, key) for key in key_types(GPTConfig) if hasattr(config, key)}
    with torch.device('meta'):
        model = GPT(GPTConfig(**keys, vocab_size=2048))
    actual = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    rows = re.findall(r'^\| `([\w.]+)` \| \(.*?\) \| \(([\d, ]+)\) \|', page('docs/model.md'), re.M)
    listed = {name: tuple(map(int, re.findall(r'\d+', shape))) for name, shape in rows}
    assert listed == {name: shape for name, shape in actual.items()
                      if '.h.' not in name or '.h.0.' in name}
