//! Certificates and keys of the server.

use cairn_nbd_proto::TlsMode;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls::{RootCertStore, ServerConfig};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Why TLS could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file could not be read or holds nothing useful.
    #[error("read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: pem::Error,
    },
    /// A file holds no certificate.
    #[error("{path} holds no certificate")]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// Certificate and key do not go together, or are of a kind not supported.
    #[error("use the certificate and key")]
    Config(#[from] rustls::Error),
    /// The authority for client certificates can't be used.
    #[error("use the authority for client certificates")]
    ClientAuthority(#[from] rustls::server::VerifierBuilderError),
}

/// TLS for a server: certificate, key, and whether clients must use it.
#[derive(Clone)]
pub struct Tls {
    pub(crate) config: Arc<ServerConfig>,
    pub(crate) mode: TlsMode,
}

impl Tls {
    /// Loads PEM files. With `client_authority` every client must present a certificate signed by it. With `required`
    /// nothing is served in the clear.
    ///
    /// # Errors
    /// [`TlsError`] when a file can't be read or used.
    pub fn load(
        certificate: &Path,
        key: &Path,
        client_authority: Option<&Path>,
        required: bool,
    ) -> Result<Self, TlsError> {
        let chain = certificates(certificate)?;
        let private =
            PrivateKeyDer::from_pem_file(key).map_err(|source| TlsError::Read { path: key.into(), source })?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder =
            ServerConfig::builder_with_provider(Arc::clone(&provider)).with_safe_default_protocol_versions()?;
        let builder = match client_authority {
            None => builder.with_no_client_auth(),
            Some(path) => builder.with_client_cert_verifier(client_verifier(path, provider)?),
        };
        let config = builder.with_single_cert(chain, private)?;
        let mode = if required { TlsMode::Required } else { TlsMode::Optional };
        Ok(Self { config: Arc::new(config), mode })
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let read = |source| TlsError::Read { path: path.into(), source };
    let chain: Vec<_> = CertificateDer::pem_file_iter(path).map_err(read)?.collect::<Result<_, _>>().map_err(read)?;
    if chain.is_empty() { Err(TlsError::Empty { path: path.into() }) } else { Ok(chain) }
}

fn client_verifier(
    path: &Path,
    provider: Arc<rustls::crypto::CryptoProvider>,
) -> Result<Arc<dyn ClientCertVerifier>, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path)? {
        roots.add(certificate)?;
    }
    Ok(WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build()?)
}
