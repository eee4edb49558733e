"""matplotlib, which is optional."""


def import_pyplot():
    """matplotlib.pyplot, set up to draw into files; None if matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use('agg')
    from matplotlib import pyplot

    return pyplot
