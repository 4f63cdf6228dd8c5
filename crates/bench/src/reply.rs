//! Judging what came back. Pure: bytes in, verdict out.

use crate::fate::Fate;

const HEAD_BYTES_MAX: usize = 64 * 1024;

/// What is waited for.
#[derive(Debug)]
pub(crate) enum Expected {
    /// Status 200 with a whole body.
    Http,
    /// A line that begins with this text.
    Line(Vec<u8>),
}

/// The judgement so far.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Incomplete,
    /// Whole and right; `reusable`: the connection may carry another request.
    Right {
        reusable: bool,
    },
    Wrong(String),
}

/// Who answered, as far as the answer says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tags {
    pub(crate) generation: Option<u32>,
    pub(crate) seat: Option<u32>,
    pub(crate) pid: Option<u32>,
}

/// One response as it comes in.
#[derive(Debug)]
pub(crate) struct Reply {
    expected: Expected,
    bytes: Vec<u8>,
}

impl Reply {
    pub(crate) fn new(expected: Expected) -> Self {
        Self { expected, bytes: Vec::new() }
    }

    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    pub(crate) fn begun(&self) -> bool {
        !self.bytes.is_empty()
    }

    pub(crate) fn verdict(&self, eof: bool) -> Verdict {
        match &self.expected {
            Expected::Http => http_verdict(&self.bytes, eof),
            Expected::Line(start) => line_verdict(&self.bytes, start),
        }
    }

    /// The fate if nothing more comes: by a reset or by an orderly end.
    pub(crate) fn cut(&self, reset: bool) -> Fate {
        match (self.begun(), reset) {
            (false, true) => Fate::ResetBeforeResponse,
            (true, true) => Fate::ResetDuringResponse,
            (false, false) => Fate::EofBeforeResponse,
            (true, false) => Fate::Short,
        }
    }

    pub(crate) fn tags(&self) -> Tags {
        let body = match &self.expected {
            Expected::Http => find(&self.bytes, b"\r\n\r\n").map_or(0, |at| at + 4),
            Expected::Line(start) => start.len().min(self.bytes.len()),
        };
        let tag = |name| tag(&self.bytes[body..], name);
        Tags { generation: tag(b"generation="), seat: tag(b"seat="), pid: tag(b"pid=") }
    }
}

fn line_verdict(bytes: &[u8], start: &[u8]) -> Verdict {
    let Some(end) = bytes.iter().position(|byte| *byte == b'\n') else { return Verdict::Incomplete };
    if bytes[..end].starts_with(start) {
        return Verdict::Right { reusable: true };
    }
    Verdict::Wrong(format!("asked for {:?}, got {:?}", show(start), show(&bytes[..end])))
}

fn http_verdict(bytes: &[u8], eof: bool) -> Verdict {
    if !bytes.starts_with(&b"HTTP/1."[..bytes.len().min(7)]) {
        return Verdict::Wrong(format!("not HTTP/1: {:?}", show(bytes)));
    }
    let Some(head) = find(bytes, b"\r\n\r\n") else {
        return if bytes.len() > HEAD_BYTES_MAX {
            Verdict::Wrong(format!("no end of the head within {HEAD_BYTES_MAX} bytes"))
        } else {
            Verdict::Incomplete
        };
    };
    let text = String::from_utf8_lossy(&bytes[..head]);
    let mut lines = text.split("\r\n");
    let status = lines.next().unwrap_or_default();
    if status.split(' ').nth(1) != Some("200") {
        return Verdict::Wrong(format!("status line {status:?}"));
    }
    let mut reusable = status.starts_with("HTTP/1.1");
    let mut length = None;
    for (name, value) in lines.filter_map(|line| line.split_once(':')) {
        let value = value.trim();
        if name.eq_ignore_ascii_case("content-length") {
            match value.parse::<usize>() {
                Ok(bytes) => length = Some(bytes),
                Err(_) => return Verdict::Wrong(format!("Content-Length {value:?}")),
            }
        } else if name.eq_ignore_ascii_case("connection") {
            reusable = !value.eq_ignore_ascii_case("close")
                && (reusable || value.eq_ignore_ascii_case("keep-alive"));
        } else if name.eq_ignore_ascii_case("transfer-encoding") {
            return Verdict::Wrong(format!(
                "Transfer-Encoding {value:?}: send Content-Length, or end by closing"
            ));
        }
    }
    match length {
        Some(length) if bytes.len() >= head + 4 + length => Verdict::Right { reusable: reusable && !eof },
        None if eof => Verdict::Right { reusable: false },
        _ => Verdict::Incomplete,
    }
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|window| window == needle)
}

/// The number behind `name`, in any case, because an upper-casing service shouts its tags too.
fn tag(text: &[u8], name: &[u8]) -> Option<u32> {
    let at = text.windows(name.len()).enumerate().position(|(at, window)| {
        window.eq_ignore_ascii_case(name) && (at == 0 || !text[at - 1].is_ascii_alphanumeric())
    })?;
    let digits = text[at + name.len()..].iter().take_while(|byte| byte.is_ascii_digit());
    digits.map(|digit| u32::from(digit - b'0')).try_fold(None, |number: Option<u32>, digit| {
        Some(Some(number.unwrap_or(0).checked_mul(10)?.checked_add(digit)?))
    })?
}

fn show(bytes: &[u8]) -> String {
    String::from_utf8_lossy(&bytes[..bytes.len().min(80)]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn http(text: &str, eof: bool) -> Verdict {
        http_verdict(text.as_bytes(), eof)
    }

    #[test]
    fn http_is_whole_by_length_or_by_eof() {
        let right = |reusable| Verdict::Right { reusable };
        assert_eq!(http("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nab", false), Verdict::Incomplete);
        assert_eq!(http("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nab", true), Verdict::Incomplete);
        assert_eq!(http("HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nabc", false), right(true));
        assert_eq!(
            http("HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n", false),
            right(false)
        );
        assert_eq!(http("HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n", false), right(false));
        assert_eq!(http("HTTP/1.0 200 OK\r\n\r\nab", false), Verdict::Incomplete);
        assert_eq!(http("HTTP/1.0 200 OK\r\n\r\nab", true), right(false));
        assert_eq!(http("HT", true), Verdict::Incomplete);
        assert_eq!(http("", true), Verdict::Incomplete);
        for wrong in
            ["HTTP/1.1 503 No\r\n\r\n", "hello", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"]
        {
            assert!(matches!(http(wrong, false), Verdict::Wrong(_)), "{wrong}");
        }
    }

    #[test]
    fn a_line_must_begin_with_what_was_asked_for() {
        assert_eq!(line_verdict(b"PING-1", b"PING-1"), Verdict::Incomplete);
        assert_eq!(line_verdict(b"PING-1\n", b"PING-1"), Verdict::Right { reusable: true });
        assert_eq!(line_verdict(b"PING-1 PID=7\n", b"PING-1"), Verdict::Right { reusable: true });
        assert!(matches!(line_verdict(b"ping-1\n", b"PING-1"), Verdict::Wrong(_)));
    }

    #[test]
    fn tags_are_read_from_the_body() {
        let mut reply = Reply::new(Expected::Http);
        reply.push(b"HTTP/1.0 200 OK\r\nX: pid=1\r\n\r\ngeneration=12 seat=0 pid=345\n");
        assert_eq!(reply.tags(), Tags { generation: Some(12), seat: Some(0), pid: Some(345) });
        let mut reply = Reply::new(Expected::Line(b"A".to_vec()));
        reply.push(b"A GENERATION=3 RAPID=4 PID=\n");
        assert_eq!(reply.tags(), Tags { generation: Some(3), seat: None, pid: None });
    }
}
