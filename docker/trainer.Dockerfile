# The image that runs every `cvf <stage>`: the library and the medical domain, no Airflow. `make trainer-image` builds it.
ARG BASE=python:3.11-slim-bookworm

# The library's requirements as files of their own, so that no other change of pyproject.toml installs them again.
FROM ${BASE} AS requirements
WORKDIR /build
COPY pyproject.toml ./
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
      > requirements.txt \
    && grep '^torch==' requirements.txt > torch.txt

# PyTorch without its C++ tests and headers. pip of the base image installs, none is left in the environment.
FROM ${BASE} AS torch
ARG PIP_ARGS=""
WORKDIR /build
COPY --from=requirements /build/torch.txt ./
RUN python -m venv --without-pip /opt/venv \
    && pip --no-cache-dir --disable-pip-version-check --python /opt/venv/bin/python install ${PIP_ARGS} \
       --no-deps --requirement torch.txt \
    && rm -rf /opt/venv/lib/python3.*/site-packages/torch/test /opt/venv/lib/python3.*/site-packages/torch/bin/test_* \
       /opt/venv/lib/python3.*/site-packages/torch/include

# The other dependencies and then the project, each in a tree of its own that the last stage lays over the environment:
# a change of a pin leaves PyTorch's layer as it is, a change of the code replaces one small layer.
FROM torch AS dependencies
COPY requirements.lock ./
COPY --from=requirements /build/requirements.txt ./
RUN pip --no-cache-dir --disable-pip-version-check --python /opt/venv/bin/python install ${PIP_ARGS} \
    --prefix /dependencies --constraint requirements.lock --requirement requirements.txt

FROM torch AS project
COPY pyproject.toml README.md ./
COPY cv_factory_ops cv_factory_ops
COPY domain_medical domain_medical
COPY plugins plugins
RUN pip --no-cache-dir --disable-pip-version-check --python /opt/venv/bin/python install ${PIP_ARGS} \
    --prefix /project --no-deps .

FROM ${BASE}
COPY --from=torch /opt/venv /opt/venv
COPY --from=dependencies /dependencies /opt/venv
COPY --from=project /project /opt/venv
# HOME: the one place that is writable where the root file system is not. LOGNAME: a numeric user has no name of its own.
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/tmp \
    LOGNAME=cvf \
    MPLCONFIGDIR=/tmp/matplotlib \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    DO_NOT_TRACK=true \
    MLFLOW_DISABLE_TELEMETRY=true \
    GIT_PYTHON_REFRESH=quiet
ARG VERSION=unknown
ARG REVISION=unknown
ENV CVF_GIT_SHA=${REVISION}
LABEL org.opencontainers.image.title="cv-factory-trainer" \
      org.opencontainers.image.description="Runs every stage of CV Factory: cvf <stage> --config FILE --run URI" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
USER 1000:1000
HEALTHCHECK --interval=60s --timeout=30s CMD ["cvf", "--version"]
ENTRYPOINT []
CMD ["cvf", "--help"]
