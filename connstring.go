package main

// connstring.go reads connection strings as libpq does. lib/pq drops parts of a URL
// that it does not understand, sslmode among them, and shows parts of passwords in
// errors.

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/lib/pq"
)

// parseURL reads a connection string as OpenDB's documentation says.
func parseURL(connString string) (cfg pq.Config, err error) {
	set, err := parseSettings(strings.TrimSpace(connString))
	if err != nil {
		return cfg, err
	}
	binding := cmp.Or(set["channel_binding"], "prefer")
	delete(set, "channel_binding")
	keywords := ""
	for name, value := range set {
		keywords += name + "='" + strings.NewReplacer(`\`, `\\`, `'`, `\'`).Replace(value) + "' "
	}
	cfg, err = pq.NewConfig(keywords)
	switch {
	case err != nil && (errors.Is(err, pq.ErrCouldNotDetectUsername) || !strings.HasPrefix(err.Error(), "pq: ")):
		return cfg, fmt.Errorf("no user given, and the current user has no name (%w)", err)
	case err != nil:
		return cfg, err
	case isSocket(cfg.Host) && !allLocal(cfg): // for which lib/pq gives up TLS
		return cfg, errors.New("a Unix socket must not come before a host that is not of this machine")
	case binding == "prefer" || binding == "disable":
	case binding != "require":
		return cfg, fmt.Errorf("channel_binding is %q; it must be disable, prefer or require", binding)
	case cfg.SSLMode == pq.SSLModeDisable:
		return cfg, errors.New("channel_binding=require needs TLS, but sslmode=disable and Unix sockets do without")
	default:
		cfg.SSLMode, cfg.SSLRootCert = pq.SSLModeVerifyFull, cmp.Or(cfg.SSLRootCert, "system")
	}
	if cfg.Host = cmp.Or(cfg.Host, "localhost"); cfg.SSLMode == "" && allLocal(cfg) {
		cfg.SSLMode = pq.SSLModeDisable
	}
	cfg.SSLMode = cmp.Or(cfg.SSLMode, pq.SSLModeRequire)
	cfg.BinaryParameters = true // sends a statement with its parameters, so that a pooler cannot separate them
	return cfg, nil
}

// Forms of connection strings, and what is pasted along with them.
var (
	pastedForm = regexp.MustCompile("^(?:postgres(?:ql)?(\\+\\w+)://|(psql\\b|export\\b|[A-Z_]*(?:URL|URI|DSN)=|[\"'`]))")
	urlForm    = regexp.MustCompile(`^postgres(?:ql)?://(?:([^:/?#\s]*)(?::([^/?#\s]*))?@)?([^@/?#\s]*)` + // user, password, hosts
		`(?:/([^@?#\s]*))?(?:\?([\w.]+=[^@#;&\s]*(?:&[\w.]+=[^@#;&\s]*)*)?)?$`) // database, query
	hostForm   = regexp.MustCompile(`^(?:\[(.*)\]|([^:]*))(?::(\d{0,5}))?$`)
	pairForm   = regexp.MustCompile(`(?s)^([A-Za-z_][\w.]*)\s*=\s*(?:'((?:[^'\\]|\\.)*)'|((?:[^\s'\\]|\\.)(?:[^\s\\]|\\.)*)?)(?:\s+|$)`)
	escapeForm = regexp.MustCompile(`(?s)\\(.)`)
	lineForm   = regexp.MustCompile(`(?m)^\s*([\w.]+)\s*=\s*(.*?)\s*$`)
)

// errSyntax does not show what is wrong: any part may belong to the password.
var errSyntax = errors.New("neither a URL such as postgres://user:password@host:port/database?name=value, with special characters " +
	"percent-encoded (@ is %40, # %23, / %2F, ? %3F, % %25), nor keywords and values such as host=localhost password='with spaces'")

// parseSettings returns the settings of a connection string by libpq's names.
func parseSettings(s string) (map[string]string, error) {
	if m := pastedForm.FindStringSubmatch(s); m != nil {
		return nil, fmt.Errorf("remove %s from the connection string", m[1]+m[2])
	}
	set := map[string]string{}
	if m := urlForm.FindStringSubmatch(s); m != nil {
		var hosts, ports []string
		for host := range strings.SplitSeq(m[3], ",") {
			h := hostForm.FindStringSubmatch(host)
			if h == nil {
				return nil, errSyntax
			}
			hosts, ports = append(hosts, h[1]+h[2]), append(ports, h[3])
		}
		pairs := []string{"user=" + m[1], "password=" + m[2], "host=" + strings.Join(hosts, ","), "dbname=" + m[4]}
		if strings.Join(ports, "") != "" {
			ports[0] = cmp.Or(ports[0], "5432") // lib/pq has this default for the others
			pairs = append(pairs, "port="+strings.Join(ports, ","))
		}
		for _, pair := range append(pairs, strings.Split(m[5], "&")...) {
			name, value, _ := strings.Cut(pair, "=")
			value, err := url.PathUnescape(value)
			if err != nil || strings.Contains(value, "\x00") {
				return nil, errSyntax
			}
			if value != "" {
				set[name] = value
			}
		}
		return set, addService(set)
	}
	for s != "" {
		m := pairForm.FindStringSubmatch(s)
		if m == nil {
			return nil, errSyntax
		}
		set[m[1]] = escapeForm.ReplaceAllString(m[2]+m[3], "$1")
		s = s[len(m[0]):]
	}
	return set, addService(set)
}

// addService adds the settings of a service file that the connection string does
// not have itself. lib/pq would let the file win (lib/pq#1344).
func addService(set map[string]string) error {
	service, host := cmp.Or(set["service"], os.Getenv("PGSERVICE")), set["host"]
	set["service"] = ""
	if service == "" {
		return nil
	}
	home, _ := os.UserHomeDir()
	file := cmp.Or(os.Getenv("PGSERVICEFILE"), filepath.Join(home, ".pg_service.conf"))
	text, err := os.ReadFile(file)
	section := regexp.MustCompile(`(?ms)^\s*\[\s*` + regexp.QuoteMeta(service) + `\s*\](.*?)(?:^\s*\[|\z)`).FindSubmatch(text)
	if section == nil {
		return fmt.Errorf("service %q not found: %w", service, cmp.Or(err, errors.New("not in "+file)))
	}
	for _, m := range lineForm.FindAllStringSubmatch(string(section[1]), -1) {
		if _, given := set[m[1]]; !given && !(m[1] == "hostaddr" && host != "") {
			set[m[1]] = m[2]
		}
	}
	return nil
}

// isSocket reports whether a host is a Unix socket.
func isSocket(host string) bool { return filepath.IsAbs(host) || strings.HasPrefix(host, "@") }

// allLocal reports whether all hosts are Unix sockets or loopback hosts, judged
// as they are given.
func allLocal(cfg pq.Config) bool {
	hosts := append([]pq.ConfigMultihost{{Host: cfg.Host, Hostaddr: cfg.Hostaddr}}, cfg.Multi...)
	return !slices.ContainsFunc(hosts, func(h pq.ConfigMultihost) bool {
		if addr, err := netip.ParseAddr(h.Host); err == nil && !h.Hostaddr.IsValid() {
			h.Hostaddr = addr
		}
		named := h.Host == "localhost" || isSocket(h.Host)
		return !h.Hostaddr.Unmap().IsLoopback() && (h.Hostaddr.IsValid() || !named)
	})
}
