# make run and make test are all that is needed. Both install what is missing;
# they need Go, and sudo unless run as root.
# PG_BIN=/usr/lib/postgresql/17/bin chooses a PostgreSQL.

.PHONY: run test test-browser lint bench image need-go need-cc need-postgresql need-pgbouncer need-chromium need-npm
.NOTPARALLEL:

SPECTRAL    = @stoplight/spectral-cli@6.16.3
STATICCHECK = honnef.co/go/tools/cmd/staticcheck@v0.8.2

# run serves on localhost:8080, on a private PostgreSQL unless DATABASE_URL is set.
run: need-go $(if $(value DATABASE_URL),,need-postgresql)
	@go build -o tasks . && exec ./tasks

# test runs all tests, and those of the API once more through PgBouncer.
test: need-go need-cc need-postgresql need-pgbouncer
	go test -race -parallel 6 ./...
	TASKS_TEST_POOLER=1 go test -race -run "$$(sed -n 's/^func \(Test[^(]*\)(t .*/^\1$$/p' handler_test.go request_test.go response_test.go | paste -sd '|' -)" ./...

# test-browser drives the documentation page in Chromium.
test-browser: need-go need-postgresql need-chromium
	go test -tags browser -run Browser -count=1 .

# lint checks the code, for all the systems that it builds on, and openapi.json.
lint: need-go need-npm
	@unformatted=$$(gofmt -l .); [ -z "$$unformatted" ] || { echo "gofmt: $$unformatted"; exit 1; }
	go vet -tags browser ./...
	for os in linux darwin windows; do for arch in amd64 arm64; do GOOS=$$os GOARCH=$$arch go build -o /dev/null . || exit 1; done; done
	go run $(STATICCHECK) -tags browser ./...
	d=$$(mktemp -d) && trap 'rm -r "$$d"' EXIT && echo '{"extends": "spectral:oas"}' >"$$d/oas.json" && \
		npx --yes $(SPECTRAL) lint openapi.json --ruleset "$$d/oas.json" --fail-severity=hint

# bench measures each operation over HTTP, and its statements alone.
bench: need-go need-postgresql
	go test -run '^$$' -bench Tasks -benchtime 1s -timeout 60m .

# image builds the container image; docker build and podman build work too.
image:
	buildah build --format docker -t tasks .

# The other targets look for what these need, and install what is missing.
need-go:
	@want=$$(sed -n 's/^go //p' go.mod); have=$$(go env GOVERSION | sed 's/^devel //'); \
	[ "$$(printf 'go%s\n%s\n' "$$want" "$$have" | sort -V | head -n 1)" = "go$$want" ] || \
	{ echo "This needs Go $$want or later; found $${have:-none}. Install it: https://go.dev/doc/install"; exit 1; }

# The race detector needs a C compiler and the headers of the C library.
need-cc:
	@$(call need,echo '#include <stdlib.h>' | $$(go env CC) -E - >/dev/null 2>&1,gcc libc6-dev,gcc glibc-devel,gcc musl-dev,gcc)

need-postgresql:
	@PATH="$$PATH:$(PG_BIN):$$(printf %s: /usr/lib/postgresql/*/bin /usr/pgsql-*/bin /usr/libexec/postgresql* /opt/homebrew/opt/postgresql*/bin /usr/local/opt/postgresql*/bin /usr/local/pgsql/bin /Applications/Postgres.app/Contents/Versions/*/bin)"; \
	$(call need,command -v initdb >/dev/null,postgresql,postgresql-server,postgresql,postgresql)

need-pgbouncer:
	@PATH="$$PATH:/usr/sbin"; $(call need,command -v pgbouncer >/dev/null,pgbouncer,pgbouncer,pgbouncer,pgbouncer)

need-chromium:
	@$(call need,{ command -v chromium && command -v chromedriver; } >/dev/null,chromium chromium-driver,chromium chromedriver,chromium chromium-chromedriver,chromium chromedriver)

need-npm:
	@$(call need,command -v npx >/dev/null,npm,npm,npm,node)

# $(call need,test,packages of apt-get,of dnf,of apk,of brew)
need = $(1) || { \
	for manager in brew apt-get dnf apk unknown; do ! command -v $$manager >/dev/null || break; done; \
	sudo=$$([ "$$(id -u)" = 0 ] || echo sudo); \
	case $$manager in \
	brew)    set -- $(5); brew install "$$@";; \
	apt-get) set -- $(2); $$sudo sh -exc "$$apt" sh "$$@";; \
	dnf)     set -- $(3); $$sudo dnf install -y "$$@";; \
	apk)     set -- $(4); $$sudo apk add "$$@";; \
	*)       false;; \
	esac || { echo "Could not install it. Install by hand what Debian calls: $(2)"; exit 1; }; }

# Debian would also create a cluster, and start it and PgBouncer, now and at every boot.
define apt
drop_in=/etc/postgresql-common/createcluster.d/tasks.conf
if [ "$$*" = postgresql ]; then
	trap "rm -f $$drop_in" EXIT
	trap "exit 1" INT TERM
	mkdir -p $${drop_in%/*}
	echo "create_main_cluster = off" >$$drop_in
fi
apt-get update -q
apt-get install -yq --no-install-recommends "$$@"
if [ "$$*" = pgbouncer ] && [ -d /run/systemd/system ]; then
	systemctl disable --now pgbouncer
fi
endef
export apt
