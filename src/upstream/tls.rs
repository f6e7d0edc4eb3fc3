//! TLS to a workspace, over any transport below.
//!
//! Ours instead of ureq's own because that one takes either the built-in roots or a list of certificates, and a
//! company behind an inspecting proxy needs both. One rustls configuration serves all endpoints, so sessions resume.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use ureq::Error;
use ureq::unversioned::transport::{
    Buffers, ConnectionDetails, Connector, Either, NextTimeout, Transport, TransportAdapter,
};

use super::transport::SmallBuffers;
use super::wait;

/// Roots and settings for all connections to workspaces.
#[derive(Debug, Clone)]
pub struct Tls(Arc<ClientConfig>);

impl Tls {
    /// The built-in roots, and those of the given PEM files. Says which file cannot be used, and why.
    pub fn new(ca_files: &[PathBuf]) -> Result<Self, String> {
        let mut roots = RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
        for file in ca_files {
            add(&mut roots, file).map_err(|why| format!("{}: {why}", file.display()))?;
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| error.to_string())?
            .with_root_certificates(roots)
            .with_no_client_auth();
        Ok(Self(Arc::new(config)))
    }
}

fn add(roots: &mut RootCertStore, file: &Path) -> Result<(), String> {
    let pem = std::fs::read(file).map_err(|error| error.to_string())?;
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(&pem)
        .collect::<Result<_, _>>()
        .map_err(|error| format!("not a PEM file of certificates: {error}"))?;
    let (added, _) = roots.add_parsable_certificates(certificates);
    if added == 0 { Err("holds no usable certificate (PEM, BEGIN CERTIFICATE)".into()) } else { Ok(()) }
}

/// Wraps the connection below in TLS when the address says https.
#[derive(Debug)]
pub(super) struct TlsConnector(pub(super) Tls);

impl<In: Transport> Connector<In> for TlsConnector {
    type Out = Either<In, TlsTransport>;

    fn connect(&self, details: &ConnectionDetails, chained: Option<In>) -> Result<Option<Self::Out>, Error> {
        let Some(below) = chained else { return Ok(None) };
        if !details.needs_tls() || below.is_tls() {
            wait::note(|trace| (trace.connected, trace.received) = (true, false));
            return Ok(Some(Either::A(below)));
        }
        let transport = self.shake_hands(details, below)?;
        wait::note(|trace| (trace.connected, trace.received) = (true, false));
        Ok(Some(Either::B(transport)))
    }
}

impl TlsConnector {
    /// Apart, so that connections without TLS do not carry its frame.
    #[inline(never)]
    fn shake_hands(
        &self,
        details: &ConnectionDetails<'_>,
        below: impl Transport,
    ) -> Result<TlsTransport, Error> {
        let host = details.uri.host().unwrap_or_default().trim_matches(['[', ']']);
        let name = ServerName::try_from(host.to_string()).map_err(|_| Error::Tls("not a valid host name"))?;
        let session = ClientConnection::new(Arc::clone(&self.0.0), name).map_err(into_io)?;
        let socket = TransportAdapter::new(below.boxed(), details.current_time.clone());
        let mut stream = StreamOwned::new(session, socket);
        while stream.conn.is_handshaking() {
            stream.conn.complete_io(&mut stream.sock)?;
        }
        Ok(TlsTransport { stream, buffers: SmallBuffers::new(true) })
    }
}

fn into_io(error: rustls::Error) -> Error {
    Error::Io(std::io::Error::other(error))
}

/// One TLS connection.
pub(super) struct TlsTransport {
    stream: StreamOwned<ClientConnection, TransportAdapter>,
    buffers: SmallBuffers,
}

impl TlsTransport {
    fn flush(&mut self) -> Result<(), Error> {
        let StreamOwned { conn, sock } = &mut self.stream;
        let result =
            self.buffers.send(|rest| match rustls::Stream::new(conn, sock).write_vectored(rest)? {
                0 => Err(Error::Io(std::io::ErrorKind::WriteZero.into())),
                count => Ok(Some(count)),
            });
        self.buffers.sent();
        result
    }
}

impl Transport for TlsTransport {
    fn buffers(&mut self) -> &mut dyn Buffers {
        &mut self.buffers
    }

    fn transmit_output(&mut self, amount: usize, _: NextTimeout) -> Result<(), Error> {
        if self.buffers.gather(amount) { self.flush() } else { Ok(()) }
    }

    fn await_input(&mut self, _: NextTimeout) -> Result<bool, Error> {
        self.flush()?;
        let amount = self.stream.read(self.buffers.input_append_buf())?;
        self.buffers.input_appended(amount);
        if amount > 0 {
            wait::note(|trace| trace.received = true);
        }
        Ok(amount > 0)
    }

    fn is_open(&mut self) -> bool {
        let StreamOwned { conn, sock } = &mut self.stream;
        let below = sock.get_mut();
        // What came behind an answer, decrypted or not, would be taken for the next one.
        let is_quiet = below.buffers().input().is_empty()
            && conn.process_new_packets().is_ok_and(|state| state.plaintext_bytes_to_read() == 0);
        is_quiet && below.is_open()
    }

    fn is_tls(&self) -> bool {
        true
    }
}

impl std::fmt::Debug for TlsTransport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TlsTransport").finish_non_exhaustive()
    }
}
