"""Builds for sm_90 what was chosen by measurement on any GPU, and prints what its machine code says, as JSON."""

import json
from dataclasses import replace

from opensora_fast.kernels.compilation import compile_case, modules_with
from opensora_fast.kernels.configurations import MEASURED_FOLDER, CompileCase, candidates_of


def measured_cases(arch: str) -> list[CompileCase]:
    """The builds of `compile_cases` with what was chosen by measurement on any GPU, where that is not the default."""
    tables = {name: table for module in modules_with("CONFIGURATIONS") for name, table in module.CONFIGURATIONS.items()}
    chosen = {}
    for path in sorted(MEASURED_FOLDER.glob("*.json")):
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
            candidates = candidates_of(tables, row["kernel"], row["shape_class"], arch)
            found = next((candidate for candidate in candidates if candidate.choices == row["configuration"]), None)
            if found is not None and found.launch != candidates[0].launch:
                chosen.setdefault((row["kernel"], candidates[0]), set()).add(found)
    cases = [case for module in modules_with("compile_cases") for case in module.compile_cases(arch)]
    return [
        replace(case, configuration=configuration)
        for case in cases
        for configuration in sorted(chosen.get((case.name, case.configuration), ()), key=str)
    ]


if __name__ == "__main__":
    cases = {(case.name, case.configuration): case for case in measured_cases("sm_90")}
    rows = [
        {
            "name": f"{case.name} ({case.configuration})",
            "warps": case.configuration.num_warps,
            "attention": case.attention,
        }
        | compile_case(case, "sm_90")
        for case in cases.values()
    ]
    print(json.dumps(rows))
