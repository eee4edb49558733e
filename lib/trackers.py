"""wandb and TensorBoard, which get what log.jsonl gets. Their errors never stop training."""
import os
import secrets
import textwrap
from dataclasses import asdict
from functools import partial
from pathlib import Path

from lib.distributed import print0
from lib.errors import first_line
from lib.files import ROOT, read_text, write_text


class Trackers:
    """Those that the config asks for. One that fails is reported in a line, then left out."""

    def __init__(self, config, resuming, step):
        """step: 0, or the one to continue from."""
        self.active = [Wandb()] * config.wandb_log + [TensorBoard()] * config.tensorboard_log
        self.tell('start', config, resuming, step)

    def tell(self, method, *arguments):
        """Call a method of each."""
        for tracker in list(self.active):
            try:
                getattr(tracker, method)(*arguments)
            except (Exception, SystemExit) as error:
                self.active.remove(tracker)
                print0(f'{tracker.name} failed, going on without it: {type(error).__name__}: '
                       f'{" ".join(str(error).split())[:200]}')


class Wandb:
    """A resumed run continues its wandb run. Keys win over WANDB_* in the environment, which wins
    over our defaults; wandb itself reads WANDB_TAGS, WANDB_NOTES and many more."""
    name = 'wandb'

    def start(self, config, resuming, step):
        path = Path(config.out_dir) / 'wandb_id'
        known = resuming and path.exists()
        defaults = {
            'RUN_ID': read_text(path) if known else secrets.token_hex(4),
            'PROJECT': 'plaingpt',
            'DIR': config.out_dir,
            'DATA_DIR': os.path.join(config.out_dir, 'wandb'),  # of tables, until they are uploaded
            'SAVE_CODE': 'true',  # the difference to the git revision
            'GIT_ROOT': str(ROOT),
            'INIT_TIMEOUT': '30',
        }
        for name, value in defaults.items():
            os.environ.setdefault(f'WANDB_{name}', value)
        write_text(path, os.environ['WANDB_RUN_ID'])
        import wandb  # slow, and needed with wandb_log only

        self.wandb, mode = wandb, os.environ.get('WANDB_MODE')
        init = partial(wandb.init, project=config.wandb_project, name=config.wandb_run_name,
                       config=asdict(config), resume='allow')
        try:
            if mode is None and not wandb.login(prompt=False, verify=False):
                raise wandb.errors.CommError('not logged in')
            self.run = init(mode=mode)
        except wandb.errors.CommError as error:  # no network
            print0(f'wandb: {first_line(error)}: logging offline; upload later with wandb sync')
            wandb.teardown()  # forget the attempt
            self.run = init(mode='offline')

    def log(self, line):
        self.run.log(line, step=line['step'])

    def log_samples(self, samples):
        table = self.wandb.Table(['step', 'text'], [[s['step'], s['text']] for s in samples])
        self.run.log({'samples': table}, step=samples[-1]['step'])

    def finish(self, exit_code):
        self.run.finish(exit_code=exit_code)


class TensorBoard:
    """Event files in out_dir/tensorboard."""
    name = 'TensorBoard'

    def start(self, config, resuming, step):
        from torch.utils.tensorboard import SummaryWriter  # slow

        self.writer = SummaryWriter(Path(config.out_dir) / 'tensorboard',
                                    purge_step=step if resuming else None)

    def log(self, line):
        for key, value in line.items():
            if key != 'step':
                self.writer.add_scalar(key, float(value), line['step'])
        self.writer.flush()

    def log_samples(self, samples):
        text = textwrap.indent(samples[-1]['text'], '    ')  # verbatim in Markdown
        self.writer.add_text('sample', text, samples[-1]['step'])

    def finish(self, exit_code):
        self.writer.close()
