"""The budget of large bodies: how many bytes of them are in memory at once."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

from tinsmith.server.http.bodies import Budget


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def test_a_tenant_waits_for_its_own_bodies_only() -> None:
    async def run() -> None:
        budget, began = Budget(10, 40), []

        async def read(owner: str, size: int, done: asyncio.Event) -> None:
            async with budget.take(owner, size):
                began.append((owner, size))
                await done.wait()

        done = [asyncio.Event() for _ in range(4)]
        asked = [("alice", 6), ("alice", 5), ("bob", 7), ("alice", 4)]
        tasks = [asyncio.ensure_future(read(*each, event)) for each, event in zip(asked, done, strict=True)]
        await settle()
        assert began == [("alice", 6), ("bob", 7), ("alice", 4)]
        done[0].set()
        await settle()
        assert began[-1] == ("alice", 5)
        for event in done:
            event.set()
        await asyncio.gather(*tasks)
        async with budget.take("alice", 10):  # all has been given back
            pass

    asyncio.run(run())


def test_bytes_given_back_early_are_given_back_once() -> None:
    async def run() -> None:
        budget = Budget(10, 10)
        async with budget.take("alice", 10) as give_back:
            await give_back()
            async with budget.take("alice", 10):
                await give_back()
                waiting = asyncio.ensure_future(AsyncExitStack().enter_async_context(budget.take("bob", 1)))
                await settle()
                assert not waiting.done()
                waiting.cancel()

    asyncio.run(run())


def test_a_body_over_the_share_is_read_alone() -> None:
    async def run() -> None:
        async with Budget(10, 10).take("alice", 11):
            pass

    asyncio.run(asyncio.wait_for(run(), 5))
