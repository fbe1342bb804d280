"""A request's permit: when it is taken, and that it comes back once, whatever becomes of the request."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from server.errors import OverloadedError, ValidationError
from server.requests.sampling import Parameters
from server.requests.validation import GenerationInput
from server.service import GenerationService
from server.text.tokenizer import TextTokenizer
from tests.unit.server.harness import FakeEngine, make_config

VALID = GenerationInput(inputs="x", parameters=Parameters(), is_stream=True)
INVALID = GenerationInput(inputs="x", parameters=Parameters(temperature=0.0), is_stream=True)


@pytest.fixture(params=[False, True], ids=["default", "strict"])
def service(
    request: pytest.FixtureRequest, engine: FakeEngine, tokenizer: TextTokenizer
) -> Iterator[GenerationService]:
    config = make_config(max_concurrent_requests=2, is_strict_tgi=request.param)
    service = GenerationService(engine, config, tokenizer)
    yield service
    assert service.admission.num_free == 2
    service.grammars.close()


async def test_a_plain_answer_takes_its_permits_as_its_block_begins(service: GenerationService) -> None:
    opening = service.open(VALID, VALID)
    assert service.admission.num_free == 2
    async with opening as streams:
        assert (len(streams), service.admission.num_free) == (2, 0)
        with pytest.raises(OverloadedError):
            async with service.open(VALID):
                pass


async def test_a_native_stream_has_its_permit_before_its_block_begins(service: GenerationService) -> None:
    is_strict = service.config.is_strict_tgi
    opening = service.open_with_permit(INVALID)
    assert service.admission.num_free == (2 if is_strict else 1)
    opening.close()
    assert service.admission.num_free == 2
    with pytest.raises(ValidationError):
        async with opening:
            pass
    assert service.admission.num_free == 2
    async with service.open_with_permit(VALID):
        assert service.admission.num_free == 1


async def test_an_openai_stream_is_valid_before_its_block_begins(service: GenerationService) -> None:
    if not service.config.is_strict_tgi:
        with pytest.raises(ValidationError):
            await service.open_validated(INVALID)
        assert service.admission.num_free == 2
    async with await service.open_validated(VALID):
        assert service.admission.num_free == 1


async def test_a_full_server_renders_no_chats(service: GenerationService) -> None:
    service.admission.num_free -= 2
    if service.config.is_strict_tgi:
        service.refuse_if_full(1)
    else:
        with pytest.raises(OverloadedError):
            service.refuse_if_full(1)
    service.admission.num_free += 2
    service.refuse_if_full(2)


async def test_a_permit_can_come_back_before_the_block_begins_and_not_twice(service: GenerationService) -> None:
    for opening in (service.open_with_permit(VALID), await service.open_validated(VALID)):
        for _ in range(2):
            opening.close()
    async with service.open_with_permit(VALID) as [stream]:
        await stream.collect()


async def test_a_failure_within_the_block_gives_the_permit_back(service: GenerationService) -> None:
    with pytest.raises(RuntimeError):
        async with service.open(VALID):
            raise RuntimeError
