FROM docker.io/library/golang:1.26-alpine AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY *.go schema.sql openapi.json docs.html ./
RUN CGO_ENABLED=0 go build -trimpath -ldflags='-s -w' -o /tasks .

FROM scratch
LABEL org.opencontainers.image.title="tasks" \
      org.opencontainers.image.description="Persistent task storage behind a REST API, on PostgreSQL" \
      org.opencontainers.image.licenses="MIT"
# For sslmode=verify-full and sslrootcert=system.
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/
COPY --from=build /tasks /tasks
USER 65532:65532
ENV PORT=8080
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=3s CMD ["/tasks", "-healthcheck"]
ENTRYPOINT ["/tasks"]
