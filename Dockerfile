# The image of web, worker and migrate: docker build -t jobsys .
FROM python:3.13-slim AS build
WORKDIR /src
RUN python -m venv /opt/jobsys
COPY setup.cfg pyproject.toml README.md LICENSE Procfile ./
COPY admin_ui admin_ui
COPY jobsys jobsys
COPY sql sql
RUN /opt/jobsys/bin/pip install --no-cache-dir .

# Every check, with PostgreSQL from the wheel or at TEST_DATABASE_URL: docker compose run --build tests
FROM python:3.13-slim AS tests
RUN apt-get update && apt-get install --yes --no-install-recommends chromium chromium-driver && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 10001 jobsys && install --directory --owner jobsys /src
USER jobsys
WORKDIR /src
COPY --chown=jobsys . .
RUN bin/venv local,test
CMD ["bin/test"]

FROM python:3.13-slim
RUN useradd --create-home --home-dir /var/lib/jobsys --uid 10001 jobsys \
    && install --directory --owner jobsys /var/lib/jobsys/output
COPY --from=build /opt/jobsys /opt/jobsys
ENV PATH=/opt/jobsys/bin:$PATH PYTHONUNBUFFERED=1 OUTPUT_DIR=/var/lib/jobsys/output
USER jobsys
WORKDIR /var/lib/jobsys
EXPOSE 3000
HEALTHCHECK --interval=10s --timeout=6s --start-period=20s \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen(f'http://127.0.0.1:{os.environ.get(\"PORT\", 3000)}/health/live', timeout=5)"]
CMD ["gunicorn", "jobsys.app:create_app()", "--config", "python:jobsys.gunicorn_conf"]
