"""What is learnt: one file a task."""

from .code_lm import code_lm as code_lm
from .digits import digits as digits
from .docstrings import docstrings as docstrings
from .minilm import minilm as minilm
from .minilm import tokenize as tokenize
from .task import ClassificationTask as ClassificationTask
from .task import Task as Task
from .teacher_student import teacher_student as teacher_student
from .text import text as text
