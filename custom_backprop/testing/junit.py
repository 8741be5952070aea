"""A report as JUnit's XML, which the services that run tests show."""

from __future__ import annotations

import re
from xml.etree import ElementTree as xml

from .report import Report


def junit(report: Report) -> str:
    """One suite, with a test case a check."""
    skipped = [r for r in report.results if r.status in ("not offered", "not run", "n/a")]
    counts = {
        "tests": len(report.results),
        "failures": len(report.failures),
        "skipped": len(skipped),
        "errors": 0,
    }
    suites = xml.Element("testsuites")
    suite = xml.SubElement(
        suites,
        "testsuite",
        {"name": report.name, "time": f"{sum(r.seconds for r in report.results):.3f}"}
        | {name: str(count) for name, count in counts.items()},
    )
    properties = xml.SubElement(suite, "properties")
    for name, value in report.about.items():
        xml.SubElement(properties, "property", name=name, value=_allowed(value))
    for r in report.results:
        case = xml.SubElement(
            suite, "testcase", classname=report.name, name=r.check, time=f"{r.seconds:.3f}"
        )
        if r.status == "wrong":
            failure = xml.SubElement(case, "failure", message=_allowed(r.detail.split("\n")[0]))
            failure.text = _allowed("\n\n".join(filter(None, (r.detail, r.example, r.script))))
        elif r in skipped:
            xml.SubElement(case, "skipped", message=_allowed(f"{r.status}: {r.detail}"))
    xml.indent(suites)
    return xml.tostring(suites, "unicode", xml_declaration=False)


def _allowed(text: str) -> str:
    """Without the control characters that XML does not allow, such as those of colours."""
    return re.sub("\x1b\\[[0-9;]*m|[\x00-\x08\x0b\x0c\x0e-\x1f]", "", text)
