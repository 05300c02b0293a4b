"""Evaluates the expressions of a ValidatingAdmissionPolicy with cel-python (infra/tools/policy.lock).

Reads {"policy": ..., "requests": [{"object": ..., "request": ...}, ...]}. Prints for each request the
messages of the failed validations, or null if the policy does not apply.
"""

import json
import sys
from typing import Any

import celpy


def main() -> None:
    """From stdin to stdout."""
    task = json.load(sys.stdin)
    spec = task["policy"]["spec"]
    environment = celpy.Environment()

    def program(expression: str) -> celpy.Runner:
        return environment.program(environment.compile(expression))

    conditions = [program(each["expression"]) for each in spec.get("matchConditions", ())]
    variables = [(each["name"], program(each["expression"])) for each in spec.get("variables", ())]
    validations = [(each["message"], program(each["expression"])) for each in spec["validations"]]
    answers: list[list[str] | None] = []
    for request in task["requests"]:
        names: dict[str, Any] = {key: celpy.json_to_cel(value) for key, value in request.items()}
        if not all(condition.evaluate(names) for condition in conditions):
            answers.append(None)
            continue
        names["variables"] = celpy.celtypes.MapType({})
        for name, expression in variables:
            names["variables"][celpy.celtypes.StringType(name)] = expression.evaluate(names)
        answers.append([message for message, expression in validations if not expression.evaluate(names)])
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
