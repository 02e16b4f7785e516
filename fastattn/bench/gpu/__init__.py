"""One command for a borrowed GPU: is every kernel right on it, and how fast is it?

    python -m fastattn.bench.gpu --budget 520 --out results

Sections, most important first (sections.py), each in a process of its own: a kernel that poisons the device takes its
section's process with it and nothing else. supervisor.py starts them, keeps the time and rewrites the JSON document
after every row; worker.py runs one; timing.py takes times. docs/gpu.md describes the document.
"""
