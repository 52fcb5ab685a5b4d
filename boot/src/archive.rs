//! The ramdisk: a tar archive, written in place around files that are read from the stick.
//!
//! Format: POSIX.1-1988 "ustar" (The Open Group, pax utility, "ustar Interchange Format").

use crate::Error;

/// Size of a block in bytes: headers have one, files whole ones.
const BLOCK: u64 = 512;

/// Size in bytes of what stands behind the last file: two blocks of zeros.
pub const END: u64 = 2 * BLOCK;

/// The longest name.
const MAX_NAME: usize = 100;

/// What a file of `bytes` bytes takes in the archive, with its header.
pub const fn room(bytes: u64) -> u64 {
    BLOCK + bytes.next_multiple_of(BLOCK)
}

/// An archive that is being written.
pub struct Writer<'a> {
    rest: &'a mut [u8],
    used: u64,
}

impl<'a> Writer<'a> {
    /// An archive in `out`, which is as large as [`room`] of all files and [`END`] together, or
    /// larger.
    pub fn new(out: &'a mut [u8]) -> Self {
        Self { rest: out, used: 0 }
    }

    /// Adds a file; the caller fills in its contents, `bytes` bytes that are undefined until then.
    ///
    /// # Errors
    ///
    /// The name does not fit a header, or the file does not fit the archive.
    pub fn file(&mut self, name: &str, bytes: u64) -> Result<&mut [u8], Error> {
        if name.is_empty() || name.len() > MAX_NAME {
            return Err(Error::BadFile("its name has more than 100 bytes"));
        }
        let (header, contents) = self.take(room(bytes))?.split_at_mut(BLOCK as usize);
        header.fill(0);
        let mut put = |at: usize, text: &[u8]| header[at..at + text.len()].copy_from_slice(text);
        put(0, name.as_bytes());
        put(100, b"0000644\0");
        put(108, b"0000000\0");
        put(116, b"0000000\0");
        put(124, &octal::<12>(bytes));
        put(136, &octal::<12>(0));
        // The sum is taken with spaces in its own place.
        put(148, b"        ");
        put(156, b"0");
        put(257, b"ustar\x0000");
        let sum = header.iter().map(|byte| u64::from(*byte)).sum();
        header[148..155].copy_from_slice(&octal::<7>(sum));
        let (contents, padding) = contents.split_at_mut(bytes as usize);
        padding.fill(0);
        Ok(contents)
    }

    /// Ends the archive; how many bytes it has.
    ///
    /// # Errors
    ///
    /// There is no room for the end.
    pub fn finish(mut self) -> Result<u64, Error> {
        self.take(END)?.fill(0);
        Ok(self.used)
    }

    fn take(&mut self, bytes: u64) -> Result<&'a mut [u8], Error> {
        let fits = usize::try_from(bytes).ok().filter(|bytes| *bytes <= self.rest.len());
        let Some(bytes) = fits else {
            return Err(Error::BadFile("it has grown while it was read"));
        };
        let (taken, rest) = core::mem::take(&mut self.rest).split_at_mut(bytes);
        self.rest = rest;
        self.used += bytes as u64;
        Ok(taken)
    }
}

/// A number as octal digits and a zero byte.
fn octal<const LENGTH: usize>(mut number: u64) -> [u8; LENGTH] {
    let mut text = [0; LENGTH];
    for digit in text[..LENGTH - 1].iter_mut().rev() {
        *digit = b'0' + (number % 8) as u8;
        number /= 8;
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_programs_read_what_is_written() {
        let files: [(&str, &[u8]); 3] =
            [("hv.toml", b"sld"), ("guests/empty", b""), ("guests/block", &[7; 512])];
        let size = files.iter().map(|(_, bytes)| room(bytes.len() as u64)).sum::<u64>() + END;
        let mut memory = vec![0xa5; size as usize];
        let mut archive = Writer::new(&mut memory);
        for (name, bytes) in files {
            archive.file(name, bytes.len() as u64).unwrap().copy_from_slice(bytes);
        }
        assert_eq!(archive.finish().unwrap(), size);
        let mut read = tar::Archive::new(memory.as_slice());
        let mut entries = read.entries().unwrap();
        for (name, bytes) in files {
            let mut entry = entries.next().unwrap().unwrap();
            assert_eq!(entry.path_bytes(), name.as_bytes());
            let mut contents = Vec::new();
            std::io::Read::read_to_end(&mut entry, &mut contents).unwrap();
            assert_eq!(contents, bytes);
        }
        assert!(entries.next().is_none());
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let mut memory = [0; 2048];
        let mut archive = Writer::new(&mut memory);
        assert!(archive.file(&"x".repeat(101), 0).is_err());
        assert!(archive.file("", 0).is_err());
        assert!(archive.file("a", 1537).is_err());
        assert!(archive.file(&"x".repeat(100), 513).is_ok());
        assert!(archive.finish().is_err());
    }
}
