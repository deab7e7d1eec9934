"""A pytest plugin: `--report FILE` is a JSON file of how the tests went, whole after every one of them.

passed, skipped  how many       failed  name and message of each       errors  files that could not be collected
seconds          so far         slowest the ten that took longest      done    whether the run came to its end
"""

import json
import os
import time
from pathlib import Path

import pytest


def pytest_addoption(parser):
    parser.addoption("--report", type=Path, help="JSON file that says how the tests went, written after every test")


def pytest_configure(config):
    path = config.getoption("--report")
    if path and not hasattr(config, "workerinput"):  # with xdist, the process that hears of all tests
        config.pluginmanager.register(Report(path.absolute()))


class Report:
    def __init__(self, path):
        self.path, self.begun, self.times = path, time.monotonic(), {}
        self.content = {"passed": 0, "skipped": {}, "failed": [], "errors": [], "done": False}

    def pytest_runtest_logreport(self, report):
        content = self.content
        if report.failed:
            content["failed"].append({"name": report.nodeid, "message": str(report.longrepr)[-4000:]})
        elif report.skipped:
            content["skipped"][report.nodeid] = str(report.longrepr)[-200:]
        elif report.when == "call":
            content["passed"] += 1
        self.times[report.nodeid] = self.times.get(report.nodeid, 0.0) + report.duration
        self._write()

    def pytest_collectreport(self, report):
        if report.failed:
            self.content["errors"].append({"name": report.nodeid, "message": str(report.longrepr)[-2000:]})
            self._write()

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self):
        self.content["done"] = True
        self._write()

    def _write(self):
        self.content["seconds"] = time.monotonic() - self.begun
        self.content["slowest"] = dict(sorted(self.times.items(), key=lambda item: -item[1])[:10])
        part = self.path.with_name(self.path.name + ".tmp")
        part.write_text(json.dumps(self.content, indent=1))
        os.replace(part, self.path)
