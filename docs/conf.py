# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""The documentation site.

pip install '.[lite,docs]'
sphinx-build -W --keep-going -b html docs docs/_build
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from mmdensecl import __version__

project = 'mmdensecl'
author = 'mmdensecl contributors'
project_copyright = author
release = __version__

extensions = [
    'myst_nb',
    'sphinx.ext.autodoc',
    'sphinx.ext.napoleon',
    'sphinx.ext.mathjax',
]
exclude_patterns = ['_build']

# $...$ for formulas, and #links to headings, as GitHub reads them too.
myst_enable_extensions = ['dollarmath']
myst_heading_anchors = 3
# Shown as it was run; a test runs it (tests/test_tutorial.py).
nb_execution_mode = 'off'

# Attributes of a NamedTuple would be described twice.
napoleon_use_ivar = True
autodoc_member_order = 'bysource'
autodoc_typehints = 'description'
autodoc_typehints_description_target = 'documented'

html_theme = 'furo'
html_title = f'mmdensecl {release}'
html_copy_source = False
