"""mmaccel: multimodal and generative models, faster and better at inference time, without retraining."""

from typing import TYPE_CHECKING

from mmaccel.lazy import lazy_exports

if TYPE_CHECKING:
    from mmaccel.answering import answer as answer
    from mmaccel.api import applied as applied
    from mmaccel.api import apply as apply
    from mmaccel.api import decorate as decorate
    from mmaccel.api import remove as remove
    from mmaccel.api import report as report
    from mmaccel.attachment import Attachment as Attachment
    from mmaccel.budgets import Budget as Budget
    from mmaccel.budgets import Tokens as Tokens
    from mmaccel.checks import check as check
    from mmaccel.methods import Method as Method
    from mmaccel.methods import Unsupported as Unsupported
    from mmaccel.methods import get_method as get_method
    from mmaccel.methods import list_methods as list_methods
    from mmaccel.planning import Plan as Plan
    from mmaccel.planning import plan as plan
    from mmaccel.recipes import load_recipe as load_recipe
    from mmaccel.recipes import recipe_from_data as recipe_from_data
    from mmaccel.recipes import save_recipe as save_recipe
    from mmaccel.reports import Report as Report
    from mmaccel.tuning import OutOfReach as OutOfReach
    from mmaccel.tuning import Tuned as Tuned
    from mmaccel.tuning import tune as tune

__version__ = "0.1.0"

# The public names and where they live; imported when first asked for, so that `mmaccel --help` stays quick.
_HOMES = {
    "Attachment": "attachment",
    "Budget": "budgets",
    "Method": "methods",
    "OutOfReach": "tuning",
    "Plan": "planning",
    "Report": "reports",
    "Tokens": "budgets",
    "Tuned": "tuning",
    "Unsupported": "methods",
    "answer": "answering",
    "applied": "api",
    "apply": "api",
    "check": "checks",
    "decorate": "api",
    "get_method": "methods",
    "list_methods": "methods",
    "load_recipe": "recipes",
    "plan": "planning",
    "recipe_from_data": "recipes",
    "remove": "api",
    "report": "api",
    "save_recipe": "recipes",
    "tune": "tuning",
}
__all__ = sorted(_HOMES)
__getattr__, __dir__ = lazy_exports(__name__, _HOMES)
