"""vLLM's worker on a GPU, which records kept sets and routes by itself."""

from typing import Any

from vllm.v1.worker.gpu_worker import Worker

from trimtab.rollout.engine.worker import reporting, watch

REPORTING: Any = reporting(Worker)


class GpuWorker(REPORTING):
    """Tells the capture of its graphs apart from the rest of its start, too."""

    def init_device(self) -> None:
        super().init_device()
        capture = self.model_runner.capture_model

        def watched(*args: Any, **kwargs: Any) -> Any:
            with watch(self, "graphs"):
                return capture(*args, **kwargs)

        self.model_runner.capture_model = watched
