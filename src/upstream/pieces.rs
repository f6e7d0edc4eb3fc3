//! What goes to a workspace past ureq: header lines and body, sent from where they lie.
//!
//! ureq would make an object of each header and copy the body through a buffer of its own. So it is given a request
//! with a length and nothing else, and a body that only pretends to be read; the transport puts the client's lines at
//! the end of the head that ureq wrote, and the body behind it, in one send.

use std::borrow::Cow;
use std::io::{self, IoSlice};
use std::ops::Range;
use std::sync::Arc;

/// Bytes that several may hold.
pub type Bytes = Arc<dyn AsRef<[u8]> + Send + Sync>;

/// A request body, perhaps with one part of it exchanged. Cheap to clone.
#[derive(Clone)]
pub struct Pieces {
    whole: Bytes,
    exchanged: Range<usize>,
    with: Arc<[u8]>,
}

impl Pieces {
    /// These bytes.
    pub fn whole(bytes: Bytes) -> Self {
        Self { whole: bytes, exchanged: 0..0, with: Arc::new([]) }
    }

    /// These bytes, with others in the place of a part.
    pub fn exchanged(bytes: Bytes, part: Range<usize>, with: &[u8]) -> Self {
        Self { whole: bytes, exchanged: part, with: with.into() }
    }

    /// In the order they are sent. Any may be empty.
    pub fn slices(&self) -> [&[u8]; 3] {
        let whole = (*self.whole).as_ref();
        [&whole[..self.exchanged.start], &self.with, &whole[self.exchanged.end..]]
    }

    /// Their length together.
    pub fn len(&self) -> usize {
        self.slices().iter().map(|slice| slice.len()).sum()
    }

    /// True when there is nothing to send.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// In one piece, copied only if a part was exchanged.
    pub fn joined(&self) -> Cow<'_, [u8]> {
        match self.slices() {
            [b"", b"", whole] => Cow::Borrowed(whole),
            slices => Cow::Owned(slices.concat()),
        }
    }
}

/// What the transport adds to ureq's head.
pub(super) struct Payload {
    /// Header lines, each with its line end.
    pub(super) lines: Vec<u8>,
    pub(super) body: Pieces,
}

impl Payload {
    /// All of a request: `head` is what ureq wrote, with its blank line.
    pub(super) fn slices<'a>(&'a self, head: &'a [u8]) -> [IoSlice<'a>; 6] {
        let [before, with, after] = self.body.slices();
        let open = &head[..head.len() - LINE_END.len()];
        [open, &self.lines, LINE_END, before, with, after].map(IoSlice::new)
    }
}

const LINE_END: &[u8] = b"\r\n";

/// Where the head that ureq writes ends.
pub(super) const HEAD_END: &[u8] = b"\r\n\r\n";

/// A body that ureq may think it has copied.
pub(super) struct SentElsewhere {
    /// Bytes that ureq has not yet asked for.
    pub(super) left: usize,
}

impl io::Read for SentElsewhere {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = buffer.len().min(self.left);
        self.left -= count;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sent(payload: &Payload, head: &[u8]) -> Vec<u8> {
        payload.slices(head).iter().flat_map(|slice| slice.to_vec()).collect()
    }

    #[test]
    fn lines_stand_in_the_head_and_the_body_behind_it() {
        let body: Bytes = Arc::new(b"{\"model\":\"a\"}".to_vec());
        let untouched = Payload { lines: b"x-app: cli\r\n".to_vec(), body: Pieces::whole(Arc::clone(&body)) };
        let head = b"POST / HTTP/1.1\r\nhost: w\r\n\r\n";
        let expected = b"POST / HTTP/1.1\r\nhost: w\r\nx-app: cli\r\n\r\n{\"model\":\"a\"}";
        assert_eq!(sent(&untouched, head), expected);
        assert!(matches!(untouched.body.joined(), Cow::Borrowed(b"{\"model\":\"a\"}")));
        let renamed = Pieces::exchanged(body, 9..12, b"\"longer\"");
        assert_eq!((&*renamed.joined(), renamed.len()), (&b"{\"model\":\"longer\"}"[..], 18));
        let expected = b"POST / HTTP/1.1\r\nhost: w\r\n\r\n{\"model\":\"longer\"}";
        assert_eq!(sent(&Payload { lines: Vec::new(), body: renamed }, head), expected);
    }
}
