"""Configuration of the site: Sphinx reads the repository's own Markdown, so links work there and on the site alike.

sphinx-build -W -c docs/site . SITE
"""

project = "vmconv"
html_show_copyright = False

root_doc = "docs/index"
# The root of the repository is the source directory: pages beside and below docs/ link to each other by relative paths.
include_patterns = ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "docs/**.md", "benchmarks/README.md"]
exclude_patterns = [".*", "build", "dist", "site"]

extensions = ["myst_parser"]
# Options of commands begin with two hyphens, which are no dash.
smartquotes = False
myst_heading_anchors = 5
# The changelog and reference tables have headings that repeat.
suppress_warnings = ["myst.header"]

html_theme = "furo"
html_title = "vmconv"
html_static_path = ["css"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
# Leads from the root of the site to its first page.
html_extra_path = ["static"]
