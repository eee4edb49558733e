"""What --version prints, for bug reports."""
import importlib.metadata
import platform
import subprocess

from lib.errors import first_line
from lib.files import ROOT

COMMIT = '$Format:%h of %cs$'  # git archive and GitHub's zip files fill it in (.gitattributes)
PACKAGES = ('torch', 'numpy', 'tiktoken', 'tqdm', 'wandb')


def commit():
    """Of the clone, -dirty if it has changes, or of the archive; unknown if it is neither."""
    if (ROOT / '.git').exists():
        command = ['git', '-C', str(ROOT), 'describe', '--always', '--dirty', '--tags']
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True,
                                  timeout=10).stdout.strip()
        except (OSError, subprocess.SubprocessError):  # no git, or it does not trust the folder
            pass
    return 'unknown' if '$' in COMMIT else COMMIT


def package_version(name):
    try:
        return f'{name} {importlib.metadata.version(name)}'
    except importlib.metadata.PackageNotFoundError:
        return f'{name} missing'


def devices():
    """The devices that PyTorch sees, or why it cannot be imported."""
    try:
        import torch  # slow
    except Exception as error:  # the installation is broken: that is worth a report
        return f'unknown: {type(error).__name__}: {first_line(error)}'
    names = [f'cuda:{i} {torch.cuda.get_device_name(i)} (CUDA {torch.version.cuda})'
             for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        names.append('mps')
    capability = torch.backends.cpu.get_cpu_capability()
    return ', '.join([*names, f'cpu {capability}, {torch.get_num_threads()} threads'])


def describe_version():
    return '\n'.join((f'plainGPT  {commit()}',
                      f'Python    {platform.python_version()}, {platform.platform()}',
                      f'packages  {", ".join(map(package_version, PACKAGES))}',
                      f'devices   {devices()}'))
