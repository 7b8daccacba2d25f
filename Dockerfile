# docker build .                    the CPU image: PyTorch without CUDA, our kernels compiled
# docker build --target cuda .      for NVIDIA GPUs
#
# No weights are in it but the embedded model's; others come from the volume /models or a directory mounted read-only.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/gpt2-server
ENV PATH=/opt/gpt2-server/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
# What changes seldom comes first: the dependencies stay in the build cache until pyproject.toml changes.
COPY pyproject.toml ./
ARG EXTRAS="otel tokenizers"
RUN python -c "import os, tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
    extras = [project['optional-dependencies'][each] for each in os.environ['EXTRAS'].split()]; \
    print(*project['dependencies'], *sum(extras, []), sep='\n')" > requirements.txt

FROM build AS build-cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --index-url ${TORCH_INDEX} "$(grep '^torch==' requirements.txt)"
RUN pip install --requirement requirements.txt
COPY setup.py README.md LICENSE ./
COPY model/ model/
COPY server/ server/
RUN pip install --no-deps . && ls /opt/gpt2-server/lib/python3.11/site-packages/model/kernels/_kernels*.so
# Headers and tests of PyTorch serve nobody here, nor does pip where nothing can be written.
RUN cd /opt/gpt2-server/lib/python3.11/site-packages/torch && rm -rf include test bin/*test* bin/protoc* \
    && pip uninstall --yes pip

FROM build AS build-cuda
RUN pip install --requirement requirements.txt
COPY setup.py README.md LICENSE ./
COPY model/ model/
COPY server/ server/
RUN pip install --no-deps . && ls /opt/gpt2-server/lib/python3.11/site-packages/model/kernels/_kernels*.so
RUN pip uninstall --yes pip

FROM ${BASE} AS runtime
RUN install --directory --owner=10001 --group=10001 /models
ENV PATH=/opt/gpt2-server/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/models \
    HOME=/tmp \
    GPT2_SERVER_HOST=0.0.0.0
VOLUME /models
WORKDIR /models
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=4s --start-period=120s --retries=3 CMD ["gpt2-server", "healthcheck"]
USER 10001:10001
ENTRYPOINT ["gpt2-server"]
CMD ["serve"]

FROM runtime AS cuda
# Triton compiles a small launcher for each of its kernels at the first start, and keeps it in the volume.
USER 0:0
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
USER 10001:10001
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility TRITON_CACHE_DIR=/models/.triton
COPY --from=build-cuda /opt/gpt2-server /opt/gpt2-server

FROM runtime AS cpu
COPY --from=build-cpu /opt/gpt2-server /opt/gpt2-server
