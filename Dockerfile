# The conversion service: slim, non-root, one volume. Not built here with an engine; .ci/container performs these steps
# in an empty directory instead and starts what comes out.
#
#   docker build -t statecodec . && docker run -p 127.0.0.1:8321:8321 -v statecodec:/data statecodec

FROM python:3.11-slim AS build
WORKDIR /src
COPY pyproject.toml constraints.txt README.md ./
COPY statecodec statecodec
COPY server server
COPY cli cli
RUN python -m venv /opt/statecodec \
 && /opt/statecodec/bin/pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu -c constraints.txt torch \
 && /opt/statecodec/bin/pip install --no-cache-dir -c constraints.txt '.[server]'

FROM python:3.11-slim
RUN groupadd --system --gid 10001 statecodec \
 && useradd --system --uid 10001 --gid statecodec --home-dir /data --shell /usr/sbin/nologin statecodec \
 && install -d -o statecodec -g statecodec -m 0700 /data
COPY --from=build /opt/statecodec /opt/statecodec
ENV PATH=/opt/statecodec/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    STATECODEC_SERVER_HOST=0.0.0.0 \
    STATECODEC_SERVER_PORT=8321 \
    STATECODEC_SERVER_DATA=/data \
    STATECODEC_SERVER_HOSTS='["*"]'
USER 10001:10001
VOLUME /data
EXPOSE 8321
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8321/readyz', timeout=8)"]
ENTRYPOINT ["statecodec-server"]
