from .run import Run as Run, do_run as do_run, fine_tune as fine_tune, run_arm as run_arm
from .predict import load_run as load_run, predict as predict
from .keep import kept as kept, space_needed as space_needed
from .sweeps import grid as grid, read_grid as read_grid, sweep as sweep
from .results import (
    read_runs as read_runs,
    read_curves as read_curves,
    table as table,
    show_table as show_table,
    differences as differences,
    conclusions as conclusions,
    curves as curves,
    frontier as frontier,
)
from .demo import draw_task as draw_task
