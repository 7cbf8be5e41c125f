# On a GPU:  docker build -t accumexp . && docker run --rm --gpus all -v "$PWD/runs:/runs" accumexp run accum.steps=4
# On a CPU, with smaller wheels of torch:  docker build -t accumexp --build-arg TORCH_INDEX=<address> .
FROM python:3.13-slim

# The index of torch's wheels, one of https://pytorch.org/get-started/locally/; by default pip's own, for GPUs.
ARG TORCH_INDEX=
ARG EXTRAS=text

WORKDIR /accumexp
COPY constraints.txt .
RUN pip install --no-cache-dir -c constraints.txt torch torchvision ${TORCH_INDEX:+--index-url ${TORCH_INDEX}}
COPY pyproject.toml README.md LICENSE ./
COPY accumexp accumexp
RUN pip install --no-cache-dir -c constraints.txt ".[${EXTRAS}]"

# outputs/, multirun/, data/ and mlflow.db are written here.
WORKDIR /runs
ENTRYPOINT ["sh", "-c", "command=$1; shift; exec python -m accumexp.$command \"$@\"", "accumexp"]
CMD ["run", "--help"]
