"""Tools a model calls by writing text: found on token ids, answered in text."""

from thor_fast.tools.dialect import THOR_DIALECT, TOOL_CALL_DIALECT, ErrorView, ObservationDialect
from thor_fast.tools.fence_tokens import closing_fence_tokens
from thor_fast.tools.python_tool import ExecutionLimits, PythonTool

__all__ = [
    "THOR_DIALECT",
    "TOOL_CALL_DIALECT",
    "ErrorView",
    "ExecutionLimits",
    "ObservationDialect",
    "PythonTool",
    "closing_fence_tokens",
]
