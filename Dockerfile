# A memory node: `engrampool serve` as an unprivileged user. docs/OPERATIONS.md says how to run it.
ARG BASE=python:3.11-slim

FROM ${BASE} AS build
# For strip, in this stage alone.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends binutils && rm -rf /var/lib/apt/lists/*
# pip stays in a virtual environment of its own, so that none is in the image that runs.
RUN python3 -m venv /opt/pip && python3 -m venv --without-pip /opt/engrampool
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY proto proto
COPY server server
COPY client client
RUN /opt/pip/bin/pip wheel --no-cache-dir --no-deps --wheel-dir /dist .
# What goes are the libraries' symbols and own tests, and what only downloads tokenizers: a sixth of all. Libraries in *.libs
# were laid out anew by their wheels' makers, which strip may break.
RUN /opt/pip/bin/pip --python /opt/engrampool/bin/python install --no-cache-dir "$(echo /dist/*.whl)[server,sources,etcd]" \
    && /opt/pip/bin/pip --python /opt/engrampool/bin/python uninstall --yes hf_xet \
    && find /opt/engrampool/lib -path '*/site-packages/num*/tests' -prune -exec rm -r {} + \
    && find /opt/engrampool/lib -name '*.so' -not -path '*.libs/*' -exec strip --strip-unneeded {} +
COPY deploy/healthcheck.py /opt/engrampool/healthcheck.py
# The kernels are compiled here rather than at each start, for each level of processor that the image may run on.
RUN /opt/engrampool/bin/python -m engrampool_proto.kernels.jit

# The same base, because a virtual environment works only with the interpreter that made it.
FROM ${BASE}
RUN useradd --uid 10001 --user-group --no-create-home --shell /usr/sbin/nologin engrampool
COPY --from=build /opt/engrampool /opt/engrampool
# 127.0.0.1, the default, is the container itself: nobody could reach it. The health check reads ENGRAMPOOL_LISTEN too,
# so another port is better set there than by --listen. The direct lane has a port of its own, which can be published.
ENV PATH=/opt/engrampool/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    ENGRAMPOOL_LISTEN=0.0.0.0:50051 \
    ENGRAMPOOL_DIRECT=0.0.0.0:50052 \
    ENGRAMPOOL_METRICS=0.0.0.0:9464 \
    ENGRAMPOOL_MODELS=/model
# Numeric, so that Kubernetes can see that it is not root.
USER 10001:10001
EXPOSE 50051 50052 9464
# Unhealthy only counts after the start period, which must cover the loading of the tables. Only images of Docker's format
# have it: buildah and podman leave it out without `--format docker`.
HEALTHCHECK --interval=10s --timeout=5s --retries=3 --start-period=1h \
    CMD ["/opt/engrampool/bin/python", "/opt/engrampool/healthcheck.py"]
ENTRYPOINT ["engrampool"]
CMD ["serve"]
