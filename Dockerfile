# What is committed, so that --version knows the commit:
#
#   git archive HEAD | docker build -t plaingpt -
#   docker run --rm -it -v runs:/runs plaingpt train.py config/quickstart.py --out_dir=/runs/first
#   docker run --rm -it -v runs:/runs plaingpt sample.py --out_dir=/runs/first
#
# For NVIDIA GPUs (the host needs the NVIDIA Container Toolkit), from an image with PyTorch and CUDA:
#
#   BASE=pytorch/pytorch:2.13.0-cuda13.0-cudnn9-runtime
#   git archive HEAD | docker build -t plaingpt:cuda --build-arg BASE=$BASE -
#   docker run --rm -it --gpus=all --ipc=host -v runs:/runs plaingpt:cuda train.py ...
#
# The volume `runs` outlives the containers; -v data:/plaingpt/data keeps prepared data sets too.
ARG BASE=python:3.13-slim
FROM ${BASE}

ENV PIP_BREAK_SYSTEM_PACKAGES=1 PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1
WORKDIR /plaingpt

# first what changes rarely; on a CPU alone, --build-arg PIP_EXTRA_INDEX_URL=<PyTorch's index of CPU
# wheels> saves 5 GB of CUDA libraries
ARG PIP_EXTRA_INDEX_URL
COPY requirements.txt .
RUN pip install -r requirements.txt

RUN useradd --uid 10001 --create-home plaingpt && mkdir /runs && chown plaingpt /runs .
COPY --chown=plaingpt . .
USER 10001

ENTRYPOINT ["python"]
CMD ["train.py", "--help"]
