// SPDX-License-Identifier: Apache-2.0
/* common/wire/curve.c - key files and the question whether an endpoint leaves the machine. */
#include "common/check.h"
#include "common/wire/sock.h"
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>
#include <zmq.h>

enum { Z85_CHARS = 40 };

bool td_endpoint_is_local(const char *e)
{
    if (!strncmp(e, "ipc://", 6) || !strncmp(e, "inproc://", 9)) return true;
    if (strncmp(e, "tcp://", 6)) return false;
    e += 6;
    if (!strncmp(e, "[::1]:", 6) || !strncmp(e, "localhost:", 10)) return true;
    /* 127.a.b.c only in full numbers: "127.evil.example" is a host name */
    if (strncmp(e, "127.", 4)) return false;
    int dots = 0;
    for (const char *p = e; *p != ':'; p++) {
        if (*p == '.') dots++;
        else if (!isdigit((unsigned char)*p)) return false;
    }
    return dots == 3;
}

td_status td_curve_required(const char *option, const char *endpoint, const td_curve *key, bool insecure)
{
    if (strncmp(endpoint, "tcp://", 6) && strncmp(endpoint, "ipc://", 6) && strncmp(endpoint, "inproc://", 9))
        return td_fail(TD_EBADREQ, "--%s %s is no endpoint: tcp://HOST:PORT or ipc://PATH", option, endpoint);
    if (td_endpoint_is_local(endpoint) || key || insecure) return TD_OK;
    return td_fail(TD_EBADREQ,
                   "--%s %s leaves this machine: give --curve-secret-file (`tandem keys FILE` makes one), or "
                   "--insecure",
                   option, endpoint);
}

void td_curve_generate(td_curve *c)
{
    char pub[Z85_CHARS + 1], sec[Z85_CHARS + 1];
    TD_CHECK(!zmq_curve_keypair(pub, sec));
    zmq_z85_decode(c->public_key, pub);
    zmq_z85_decode(c->secret_key, sec);
    memcpy(c->server_key, c->public_key, 32);
}

static td_status read_key(const char *path, char z85[Z85_CHARS + 1], uint8_t key[32])
{
    FILE *f = fopen(path, "re");
    if (!f) return td_fail(TD_EIO, "key file %s: %s", path, strerror(errno));
    char line[128];
    size_t n = fread(line, 1, sizeof line - 1, f);
    fclose(f);
    while (n && isspace((unsigned char)line[n - 1])) n--;
    line[n] = '\0';
    if (n != Z85_CHARS || !zmq_z85_decode(key, line))
        return td_fail(TD_EPROTO, "key file %s: not %d Z85 characters", path, Z85_CHARS);
    memcpy(z85, line, Z85_CHARS + 1);
    return TD_OK;
}

td_status td_curve_load(td_curve *c, const char *secret_file, const char *server_public_file)
{
    td_curve k;
    char sec[Z85_CHARS + 1], pub[Z85_CHARS + 1];
    TD_TRY(read_key(secret_file, sec, k.secret_key));
    if (zmq_curve_public(pub, sec)) return td_fail(TD_EPROTO, "key file %s: no secret key", secret_file);
    zmq_z85_decode(k.public_key, pub);
    memcpy(k.server_key, k.public_key, 32);
    if (server_public_file) TD_TRY(read_key(server_public_file, pub, k.server_key));
    *c = k;
    return TD_OK;
}

static td_status write_key(const char *path, const uint8_t key[32], mode_t mode)
{
    char z85[Z85_CHARS + 2];
    zmq_z85_encode(z85, key, 32);
    z85[Z85_CHARS] = '\n';
    int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, mode);
    if (fd < 0) return td_fail(TD_EIO, "key file %s: %s", path, strerror(errno));
    bool ok = write(fd, z85, Z85_CHARS + 1) == Z85_CHARS + 1;
    ok &= !close(fd);
    return ok ? TD_OK : td_fail(TD_EIO, "key file %s: %s", path, strerror(errno));
}

td_status td_curve_save(const td_curve *c, const char *secret_file, const char *public_file)
{
    if (secret_file) TD_TRY(write_key(secret_file, c->secret_key, 0600));
    if (public_file) TD_TRY(write_key(public_file, c->public_key, 0644));
    return TD_OK;
}
