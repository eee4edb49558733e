"""matplotlib, which is optional."""
import io

from lib.files import create


def import_pyplot():
    """matplotlib.pyplot, set up to draw into files; None if matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use('agg')
    from matplotlib import pyplot

    return pyplot


def save_png(pyplot, figure, path, **options):
    """Write the figure and close it. Raises OSError."""
    image = io.BytesIO()  # matplotlib would write through a link
    figure.savefig(image, format='png', **options)
    pyplot.close(figure)
    with create(path) as file:
        file.write(image.getvalue())
