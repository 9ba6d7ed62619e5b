// SPDX-License-Identifier: Apache-2.0
/* TLS on the listeners: certificate, ALPN (h2, http/1.1), optional client certificates; files that change are
 * read again. */
#include "common/check.h"
#include "common/log.h"
#include "router/net/net_int.h"
#include <openssl/err.h>
#include <signal.h>
#include <string.h>
#include <sys/stat.h>

enum { LOOK_EVERY_US = 10000000 };

/* The reason of the first OpenSSL error, which is the cause; the queue is per thread and must be empty before the
 * next SSL call. */
static const char *ssl_reason(void)
{
    unsigned long e = ERR_peek_error();
    const char *text = ERR_SYSTEM_ERROR(e) ? strerror(ERR_GET_REASON(e)) : ERR_reason_error_string(e);
    ERR_clear_error();
    return text ? text : "unknown reason";
}

/* Ours first: h2 wherever the client can. No common protocol: refuse, rather than speak something it did not
 * offer. */
static int choose_protocol(SSL *ssl, const unsigned char **out, unsigned char *n_out, const unsigned char *in,
                           unsigned n_in, void *arg)
{
    static const unsigned char ours[] = "\x02h2\x08http/1.1";
    unsigned char *chosen = NULL;
    (void)ssl, (void)arg;
    if (SSL_select_next_proto(&chosen, n_out, ours, sizeof ours - 1, in, n_in) != OPENSSL_NPN_NEGOTIATED)
        return SSL_TLSEXT_ERR_ALERT_FATAL;
    *out = chosen;
    return SSL_TLSEXT_ERR_OK;
}

/* A key with a passphrase is refused: a server must not wait at a terminal. */
static int no_passphrase(char *buf, int size, int writing, void *arg)
{
    (void)buf, (void)size, (void)writing;
    if (arg) *(bool *)arg = true;
    return -1;
}

static td_status make_context(const td_net_opts *o, SSL_CTX **out)
{
    SSL_CTX *x = SSL_CTX_new(TLS_server_method());
    if (!x) return td_fail(TD_EFULL, "tls: out of memory");
    SSL_CTX_set_min_proto_version(x, TLS1_2_VERSION);
    SSL_CTX_set_options(x, SSL_OP_NO_RENEGOTIATION | SSL_OP_NO_COMPRESSION | SSL_OP_IGNORE_UNEXPECTED_EOF |
                               SSL_OP_CIPHER_SERVER_PREFERENCE);
    SSL_CTX_set_mode(x, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER |
                            SSL_MODE_RELEASE_BUFFERS);
    SSL_CTX_set_alpn_select_cb(x, choose_protocol, NULL);
    bool locked = false;
    SSL_CTX_set_default_passwd_cb(x, no_passphrase);
    SSL_CTX_set_default_passwd_cb_userdata(x, &locked);
    static const unsigned char session[] = "tandem"; /* resumption with client certificates needs a context */
    SSL_CTX_set_session_id_context(x, session, sizeof session - 1);
    td_status s = TD_OK;
    if (SSL_CTX_use_certificate_chain_file(x, o->tls_cert_file) != 1)
        s = td_fail(TD_EIO, "tls: certificate \"%s\": %s", o->tls_cert_file, ssl_reason());
    else if (SSL_CTX_use_PrivateKey_file(x, o->tls_key_file, SSL_FILETYPE_PEM) != 1 ||
             SSL_CTX_check_private_key(x) != 1)
        s = td_fail(TD_EIO, "tls: key \"%s\": %s", o->tls_key_file,
                    locked ? "it has a passphrase" : ssl_reason());
    else if (o->tls_client_ca_file && SSL_CTX_load_verify_locations(x, o->tls_client_ca_file, NULL) != 1)
        s = td_fail(TD_EIO, "tls: client CA \"%s\": %s", o->tls_client_ca_file, ssl_reason());
    SSL_CTX_set_default_passwd_cb_userdata(x, NULL);
    ERR_clear_error();
    if (s != TD_OK) {
        SSL_CTX_free(x);
        return s;
    }
    if (o->tls_client_ca_file) SSL_CTX_set_verify(x, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, NULL);
    *out = x;
    return TD_OK;
}

static int64_t changed_us(const td_net_opts *o)
{
    const char *files[] = {o->tls_cert_file, o->tls_key_file, o->tls_client_ca_file};
    int64_t newest = 0;
    for (int i = 0; i < 3; i++) {
        struct stat st;
        if (!files[i] || stat(files[i], &st)) continue;
        int64_t t = (int64_t)st.st_mtim.tv_sec * 1000000 + st.st_mtim.tv_nsec / 1000;
        if (t > newest) newest = t;
    }
    return newest;
}

td_status tls_open(td_net *n)
{
    const td_net_opts *o = &n->o;
    if (!o->tls_cert_file && !o->tls_key_file && !o->tls_client_ca_file) return TD_OK;
    if (!o->tls_cert_file || !o->tls_key_file)
        return td_fail(TD_EBADREQ, "tls: a certificate and its key are needed");
    signal(SIGPIPE, SIG_IGN); /* OpenSSL writes with write(2) */
    n->tls_changed_us = changed_us(o);
    return make_context(o, &n->tls);
}

void tls_close(td_net *n)
{
    if (n->tls) SSL_CTX_free(n->tls);
    n->tls = NULL;
}

/* Certificates are renewed while we run. A broken pair is reported once and the old one stays. */
void tls_sweep(td_net *n, int64_t now)
{
    if (!n->tls || now - n->tls_looked_us < TD_MIN(n->o.idle_us, (int64_t)LOOK_EVERY_US)) return;
    n->tls_looked_us = now;
    int64_t changed = changed_us(&n->o);
    if (changed == n->tls_changed_us) return;
    n->tls_changed_us = changed;
    SSL_CTX *fresh = NULL;
    if (make_context(&n->o, &fresh) != TD_OK) return;
    SSL_CTX_free(n->tls); /* living connections hold their own reference */
    n->tls = fresh;
    TD_INFO("net: new certificate in use");
}

SSL *tls_accept(td_net *n, int fd)
{
    SSL *ssl = SSL_new(n->tls);
    if (ssl && SSL_set_fd(ssl, fd) == 1) {
        SSL_set_accept_state(ssl);
        return ssl;
    }
    if (ssl) SSL_free(ssl);
    ERR_clear_error();
    return NULL;
}
