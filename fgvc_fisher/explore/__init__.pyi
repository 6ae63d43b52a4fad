from .penalty import explore_penalty as explore_penalty
from .fisher import explore_fisher as explore_fisher
from .published import explore_published as explore_published
from .training import explore_training as explore_training
from .classifier import try_classifier as try_classifier, try_run as try_run
