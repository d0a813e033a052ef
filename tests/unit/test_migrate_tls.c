/*
 * Migration by TLS: certificates that fit, and those that do not.
 */
#include "migrate_trip.h"

#include <gnutls/gnutls.h>
#include <gnutls/x509.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "migrate/postcopy.h"

static gnutls_x509_privkey_t make_key(void)
{
    gnutls_x509_privkey_t key;

    assert_int_equal(gnutls_x509_privkey_init(&key), 0);
    assert_int_equal(gnutls_x509_privkey_generate(key, GNUTLS_PK_ECDSA, GNUTLS_CURVE_TO_BITS(GNUTLS_ECC_CURVE_SECP256R1), 0), 0);
    return key;
}

static gnutls_x509_crt_t make_certificate(const char *name, gnutls_x509_privkey_t key, gnutls_x509_crt_t issuer,
                                          gnutls_x509_privkey_t issuer_key)
{
    gnutls_x509_crt_t crt;
    uint8_t serial = (uint8_t)(strlen(name) + (issuer ? 1 : 0));

    gnutls_x509_crt_init(&crt);
    gnutls_x509_crt_set_version(crt, 3);
    gnutls_x509_crt_set_serial(crt, &serial, 1);
    gnutls_x509_crt_set_activation_time(crt, time(NULL) - 3600);
    gnutls_x509_crt_set_expiration_time(crt, time(NULL) + 3600);
    gnutls_x509_crt_set_dn_by_oid(crt, GNUTLS_OID_X520_COMMON_NAME, 0, name, (unsigned)strlen(name));
    gnutls_x509_crt_set_subject_alt_name(crt, GNUTLS_SAN_DNSNAME, name, (unsigned)strlen(name), GNUTLS_FSAN_SET);
    gnutls_x509_crt_set_key(crt, key);
    gnutls_x509_crt_set_basic_constraints(crt, issuer == NULL, -1);
    if (!issuer)
        gnutls_x509_crt_set_key_usage(crt, GNUTLS_KEY_KEY_CERT_SIGN);
    assert_int_equal(gnutls_x509_crt_sign2(crt, issuer ? issuer : crt, issuer_key, GNUTLS_DIG_SHA256, 0), 0);
    return crt;
}

static void write_pem(const char *dir, const char *name, gnutls_datum_t *pem)
{
    char path[160];
    FILE *f;

    snprintf(path, sizeof(path), "%s/%s", dir, name);
    f = fopen(path, "w");
    assert_non_null(f);
    fwrite(pem->data, 1, pem->size, f);
    fclose(f);
    gnutls_free(pem->data);
}

/* A trip_folder with what --tls wants: certified for localhost by an authority that is new for each. */
static void make_tls(char dir[96], const char *name)
{
    gnutls_x509_privkey_t ca_key = make_key(), key = make_key();
    gnutls_x509_crt_t ca = make_certificate("authority", ca_key, NULL, ca_key);
    gnutls_x509_crt_t crt = make_certificate("localhost", key, ca, ca_key);
    gnutls_datum_t pem;

    snprintf(dir, 96, "%s/%s", trip_folder, name);
    assert_int_equal(mkdir(dir, 0700), 0);
    assert_int_equal(gnutls_x509_crt_export2(ca, GNUTLS_X509_FMT_PEM, &pem), 0);
    write_pem(dir, "ca.pem", &pem);
    assert_int_equal(gnutls_x509_crt_export2(crt, GNUTLS_X509_FMT_PEM, &pem), 0);
    write_pem(dir, "cert.pem", &pem);
    assert_int_equal(gnutls_x509_privkey_export2(key, GNUTLS_X509_FMT_PEM, &pem), 0);
    write_pem(dir, "key.pem", &pem);
    gnutls_x509_crt_deinit(ca);
    gnutls_x509_crt_deinit(crt);
    gnutls_x509_privkey_deinit(ca_key);
    gnutls_x509_privkey_deinit(key);
}

static void remove_tls(const char *dir)
{
    static const char *const names[] = { "ca.pem", "cert.pem", "key.pem" };
    char path[160];

    for (unsigned i = 0; i < 3; i++) {
        snprintf(path, sizeof(path), "%s/%s", dir, names[i]);
        unlink(path);
    }
    rmdir(dir);
}

static void test_tls(void **state)
{
    char ours[96], theirs[96];
    char why[CHANNEL_ERROR_MAX];

    make_tls(ours, "ours");
    make_tls(theirs, "theirs");
    for (unsigned i = 0; i < 6; i++) {
        struct trip *t = trip_make();

        /* The same authority, by TCP to the certified name, in both ways of copying; then what must not work. */
        strcpy(t->listen, "tcp:localhost:0");
        trip_target(t, i == 5 ? NULL : ours);
        snprintf(t->to, sizeof(t->to), "tcp:%s:%u", i == 3 ? "127.0.0.1" : "localhost", migrate_target_port(t->target));
        t->options.tls_dir = i == 2 ? theirs : i == 4 ? NULL : ours;
        t->options.post_copy = i == 1 && postcopy_usable(false, why) ? MIGRATE_POST_COPY_NOW : MIGRATE_POST_COPY_NEVER;
        trip_source(t);
        if (i < 2)
            trip_arrived(t);
        else
            trip_stayed(t, (const char *const[]){ "certificate", "certificate", "want TLS", "use TLS" }[i - 2]);
    }
    remove_tls(ours);
    remove_tls(theirs);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_tls),
    };

    return trip_tests(tests);
}
