"""The tools of an MCP server, which runs as a process and is spoken to over stdio, for rows of data.

    env=resource_sessions env.environment=grpo.envs.adapters.mcp_tools:McpTools env.path=rows.jsonl \\
        "env.kwargs={command: [python, my_server.py]}"

MCP knows tools, and neither tasks nor rewards: a row has the prompt and the answer, or a function of one's own judges. An episode
that calls has a server of its own, started at its first call and ended with it, so that episodes share no state.
"""

import asyncio
import os
from typing import Any

from grpo.envs.adapters.session import ToolResult, Verified, final_text, import_extra
from grpo.rewards.functions import load_function
from grpo.rewards.match import exact_match

START_SECONDS = 60.0  # that a server may take to start and to list its tools, before a run begins


class McpTools:
    """command: the server's program and arguments; environment: its variables, beside the few that MCP passes on; prompt_key,
    answer_key: columns of a row; reward: a function of (row, transcript), as module:name or file.py:name, that returns a number;
    null: whether the final message is the answer."""

    def __init__(self, command: list[str], environment: dict[str, str] | None = None, prompt_key: str = "prompt",
                 answer_key: str = "answer", reward: str | None = None) -> None:
        self.library = import_extra("mcp", "mcp")
        self.server = self.library.StdioServerParameters(command=command[0], args=[*command[1:]], env=environment)
        self.prompt_key, self.answer_key = prompt_key, answer_key
        self.judge = None if reward is None else load_function(reward, key="env.kwargs.reward")
        try:
            self.tools = asyncio.run(asyncio.wait_for(self._list(), START_SECONDS))
        except TimeoutError as error:
            raise ValueError(f"env.kwargs.command={command!r}: it listed no tools within {START_SECONDS:g} s") from error
        except Exception as error:  # of the server, or that there is none
            raise ValueError(f"env.kwargs.command={command!r}: no MCP server answers: {describe(error)}") from error

    def create(self, task: dict | None, seed: int = 0, episode_id: str | None = None) -> "_McpSession":
        wanted = [self.prompt_key] + ([self.answer_key] if self.judge is None else [])
        if task is None:
            raise ValueError("env.path: an MCP server has tools and no tasks; give rows with the columns " + ", ".join(wanted))
        if missing := [key for key in wanted if key not in task]:
            raise ValueError(f"env.path: a row has no column {', '.join(missing)} (env.kwargs.prompt_key, answer_key)")
        return _McpSession(self, task)

    async def _list(self) -> list[dict]:
        async with (self.library.stdio_client(self.server) as streams, self.library.ClientSession(*streams) as client):
            await client.initialize()
            return [tool.model_dump(by_alias=True) for tool in (await client.list_tools()).tools]


class _McpSession:
    """Its client lives in one task, as it must, which serves a queue of calls."""

    def __init__(self, owner: McpTools, row: dict) -> None:
        self.owner, self.row = owner, row
        self._calls: asyncio.Queue | None = None
        self._client: asyncio.Task | None = None

    def initial_messages(self) -> list[dict]:
        asked = self.row[self.owner.prompt_key]
        return [{"role": "user", "content": asked}] if isinstance(asked, str) else [*asked]

    def list_tools(self) -> list[dict]:
        return self.owner.tools

    async def call_tool(self, name: str, arguments: dict) -> ToolResult:
        if self._client is None:
            self._calls = asyncio.Queue()
            self._client = asyncio.create_task(self._serve(self._calls))
        reply = asyncio.get_running_loop().create_future()
        self._calls.put_nowait((name, arguments, reply))
        await asyncio.wait([reply, self._client], return_when=asyncio.FIRST_COMPLETED)
        if not reply.done():
            raise RuntimeError("the MCP server ended") from self._client.exception()
        return reply.result()

    def verify(self, transcript: list[dict], final_state: object = None) -> Verified:
        if self.owner.judge is not None:
            return Verified(float(self.owner.judge(self.row, transcript)))
        return Verified(exact_match(final_text(transcript), str(self.row[self.owner.answer_key])))

    def close(self) -> object:
        return None if self._client is None else self._end()

    async def _end(self) -> None:
        self._calls.put_nowait(None)
        await asyncio.wait([self._client])

    async def _serve(self, calls: asyncio.Queue) -> None:
        library = self.owner.library
        with open(os.devnull, "w") as unread:  # its log; what it wrote as its tools were listed was shown
            async with (library.stdio_client(self.owner.server, errlog=unread) as streams,
                        library.ClientSession(*streams) as client):
                await self._answer(client, calls)

    @staticmethod
    async def _answer(client: Any, calls: asyncio.Queue) -> None:
        await client.initialize()
        while (call := await calls.get()) is not None:
            name, arguments, reply = call
            reply.set_result(read_result((await client.call_tool(name, arguments)).model_dump(by_alias=True)))


def read_result(result: dict[str, Any]) -> ToolResult:
    """A tool's result: the text of its parts, others by their type."""
    text = "\n".join(part["text"] if part["type"] == "text" else f"[{part['type']}]" for part in result["content"])
    return ToolResult(error=text or "the tool failed") if result.get("isError") else ToolResult(text)


def describe(error: BaseException) -> str:
    """An error's text; of a group of errors, the first one's."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"
