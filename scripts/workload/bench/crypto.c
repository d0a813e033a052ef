/*
 * crypto sha256|aes-gcm|rsa2048 N: a fixed amount of OpenSSL's work: N hashes or encryptions of 8 KiB, or N signatures.
 * What is printed depends on every result.
 */
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/rsa.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static unsigned char data[8192], result[8192 + 16];

static int sha256(long n)
{
    for (long i = 0; i < n; i++) {
        if (EVP_Digest(data, sizeof(data), result, NULL, EVP_sha256(), NULL) != 1)
            return -1;
        memcpy(data + i % 256 * 32, result, 32);
    }
    return 32;
}

static int aes_gcm(long n)
{
    unsigned char key[32] = "a key of two hundred fifty six.", nonce[12] = "";
    EVP_CIPHER_CTX *c = EVP_CIPHER_CTX_new();
    int length, last;
    for (long i = 0; i < n; i++) {
        memcpy(nonce, &i, sizeof(i));
        if (EVP_EncryptInit_ex(c, EVP_aes_256_gcm(), NULL, key, nonce) != 1 ||
            EVP_EncryptUpdate(c, data, &length, data, sizeof(data)) != 1 ||
            EVP_EncryptFinal_ex(c, result, &last) != 1 || EVP_CIPHER_CTX_ctrl(c, EVP_CTRL_AEAD_GET_TAG, 16, result) != 1)
            return -1;
        data[i % 8192] ^= result[i % 16];
    }
    EVP_CIPHER_CTX_free(c);
    memcpy(result + 16, data, 64);
    return 80;
}

/* PKCS #1 signatures are deterministic: each one is the next one's message. */
static int rsa2048(long n)
{
    EVP_PKEY *key = NULL;
    EVP_PKEY_CTX *c;
    FILE *f = fopen("/workload/rsa2048.pem", "r");
    size_t length;
    if (!f || !(key = PEM_read_PrivateKey(f, NULL, NULL, NULL)) || !(c = EVP_PKEY_CTX_new(key, NULL)))
        return -1;
    fclose(f);
    if (EVP_PKEY_sign_init(c) != 1 || EVP_PKEY_CTX_set_rsa_padding(c, RSA_PKCS1_PADDING) != 1 ||
        EVP_PKEY_CTX_set_signature_md(c, EVP_sha256()) != 1)
        return -1;
    for (long i = 0; i < n; i++) {
        length = sizeof(result);
        if (EVP_PKEY_sign(c, result, &length, data, 32) != 1)
            return -1;
        memcpy(data, result, 32);
    }
    EVP_PKEY_CTX_free(c);
    EVP_PKEY_free(key);
    return (int)length;
}

int main(int argc, char **argv)
{
    long n = argc > 2 ? atol(argv[2]) : 0;
    int length = -1;
    if (n > 0 && strcmp(argv[1], "sha256") == 0)
        length = sha256(n);
    else if (n > 0 && strcmp(argv[1], "aes-gcm") == 0)
        length = aes_gcm(n);
    else if (n > 0 && strcmp(argv[1], "rsa2048") == 0)
        length = rsa2048(n);
    if (length < 0) {
        fprintf(stderr, "usage: crypto sha256|aes-gcm|rsa2048 N, or OpenSSL failed\n");
        return 1;
    }
    for (int i = 0; i < length; i++)
        printf("%02x", result[i]);
    printf("\n");
    return 0;
}
