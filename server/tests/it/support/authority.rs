//! Certificates for the tests' servers.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use tokio_rustls::rustls::{
    ServerConfig,
    crypto::aws_lc_rs::default_provider,
    pki_types::{PrivateKeyDer, pem::PemObject as _},
};

/// A certificate authority, and a certificate for `localhost` that it has issued.
pub(crate) struct Authority {
    /// The file with the authority's certificate.
    pub(crate) root: PathBuf,
    pub(crate) config: Arc<ServerConfig>,
}

impl Authority {
    pub(crate) fn new(dir: &Path, name: &str) -> Self {
        let mut authority = CertificateParams::new(Vec::new()).expect("no names");
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        authority.distinguished_name.push(DnType::CommonName, name);
        let authority_key = KeyPair::generate().expect("a key");
        let certificate = authority
            .self_signed(&authority_key)
            .expect("a signed certificate");
        let issuer = Issuer::new(authority, authority_key);
        let key = KeyPair::generate().expect("a key");
        let mut leaf = CertificateParams::new(vec!["localhost".to_owned()]).expect("a name");
        // OpenSSL treats a certificate as self-signed if its subject is the same as its issuer's, so set a different
        // subject.
        leaf.distinguished_name
            .push(DnType::CommonName, "localhost");
        let leaf = leaf.signed_by(&key, &issuer).expect("a signed certificate");
        let root = dir.join(format!("{name}.pem"));
        fs::write(&root, certificate.pem()).expect("the file is written");
        let provider = Arc::new(default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("versions of TLS")
            .with_no_client_auth()
            .with_single_cert(
                vec![leaf.der().clone()],
                PrivateKeyDer::from_pem_slice(key.serialize_pem().as_bytes()).expect("a key"),
            )
            .expect("the key belongs to the certificate");
        Self {
            root,
            config: Arc::new(config),
        }
    }
}
