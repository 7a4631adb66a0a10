"""Apptainer images of the whole environment: rendered, linted, built, tested and run.

::

    target = load_target("cpu")
    text = render("environment", arguments(target, provenance, {"BASE": "base.sif", ...}))     render: pure
    findings = lint(read_definition(text))                                                     definition, lint: pure
    build(find_runtime(), text, Path("deepdisc-ops.sif"), binds=[...])                         runtime, build: Apptainer, by spython

The definitions are in ``containers/``, in Apptainer's own template language, so that they can be built without us.
"""
