from .quadratic import (
    QuadraticPenalty as QuadraticPenalty,
    find_new as find_new,
    mismatched_parameters as mismatched_parameters,
    parameter_kinds as parameter_kinds,
)
from .merging import merge as merge, interpolate as interpolate
