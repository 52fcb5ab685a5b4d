//! The ramdisk: a tar archive with `hv.toml` and the guests' images.

use core::fmt;

use tar_no_std::TarArchiveRef;

/// The configuration's name in the archive.
pub const CONFIG: &str = "hv.toml";

/// Why the ramdisk is of no use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RamdiskError {
    /// The loader gave none.
    Absent,
    /// It is no tar archive, or it is cut off.
    Damaged,
    /// The archive lacks `hv.toml`.
    NoConfig,
}

impl fmt::Display for RamdiskError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Absent => "there is no ramdisk: build the image with `cargo xtask image`",
            Self::Damaged => {
                "the ramdisk is not a whole tar archive (truncated or damaged): build the image \
                 again with `cargo xtask image`"
            }
            Self::NoConfig => "the ramdisk has no hv.toml: add one at the archive's root",
        })
    }
}

/// A checked archive.
#[derive(Debug, Clone)]
pub struct Ramdisk<'a> {
    archive: TarArchiveRef<'a>,
}

/// Size of a tar record.
const BLOCK: usize = 512;

/// Takes the area for the log that outlives a restart off the front of an archive, if its first file
/// is one. What is left is an archive, too.
pub fn split_log(data: &mut [u8]) -> (Option<&mut [u8]>, &[u8]) {
    match log_end(data).filter(|end| *end <= data.len()) {
        Some(end) => {
            let (log, rest) = data.split_at_mut(end);
            (Some(&mut log[BLOCK..]), rest)
        }
        None => (None, data),
    }
}

/// Where the first file ends, if it is the log's area.
fn log_end(data: &[u8]) -> Option<usize> {
    let head = data.get(..BLOCK)?;
    let name = head[..100].split(|byte| *byte == 0).next()?;
    let size = (name == boot::log::NAME.as_bytes()).then(|| octal(&head[124..136]))??;
    BLOCK.checked_add(usize::try_from(size).ok()?.checked_next_multiple_of(BLOCK)?)
}

impl<'a> Ramdisk<'a> {
    /// Checks that `data` is a tar archive with its end marker, so that nothing is cut off.
    ///
    /// # Errors
    ///
    /// [`RamdiskError::Damaged`].
    pub fn new(data: &'a [u8]) -> Result<Self, RamdiskError> {
        let archive = TarArchiveRef::new(data).map_err(|_| RamdiskError::Damaged)?;
        check(data).ok_or(RamdiskError::Damaged)?;
        Ok(Self { archive })
    }

    /// A file's contents. Where there is none of this name, capitals do not matter: on the stick
    /// they do not either.
    pub fn file(&self, path: &str) -> Option<&'a [u8]> {
        let exact = |name: &str| name == path;
        let alike = |name: &str| name.eq_ignore_ascii_case(path);
        self.find(exact).or_else(|| self.find(alike))
    }

    fn find(&self, matches: impl Fn(&str) -> bool) -> Option<&'a [u8]> {
        let matching = |name: &str| matches(name.strip_prefix("./").unwrap_or(name));
        let mut entries = self.archive.entries();
        entries.find(|entry| entry.filename().as_str().is_ok_and(matching)).map(|e| e.data())
    }

    /// `hv.toml`.
    ///
    /// # Errors
    ///
    /// [`RamdiskError::NoConfig`].
    pub fn config(&self) -> Result<&'a [u8], RamdiskError> {
        self.file(CONFIG).ok_or(RamdiskError::NoConfig)
    }
}

/// Follows the headers to the end marker, two zero records; checks each header's checksum (the
/// `ustar` format's, POSIX.1-1988).
fn check(data: &[u8]) -> Option<()> {
    let mut at = 0usize;
    loop {
        let header = data.get(at..at.checked_add(BLOCK)?)?;
        if header.iter().all(|byte| *byte == 0) {
            return data.get(at + BLOCK..at + 2 * BLOCK).map(|_| ());
        }
        let sum: u32 = header
            .iter()
            .enumerate()
            .map(|(index, byte)| if (148..156).contains(&index) { 32 } else { u32::from(*byte) })
            .sum();
        if octal(&header[148..156])? != u64::from(sum) {
            return None;
        }
        let size = usize::try_from(octal(&header[124..136])?).ok()?;
        at = at.checked_add(BLOCK)?.checked_add(size.checked_next_multiple_of(BLOCK)?)?;
    }
}

fn octal(field: &[u8]) -> Option<u64> {
    let text = core::str::from_utf8(field).ok()?;
    u64::from_str_radix(text.trim_matches(['\0', ' ']), 8).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{format, vec, vec::Vec};

    fn entry(name: &str, data: &[u8]) -> Vec<u8> {
        let mut header = vec![0; BLOCK];
        header[..name.len()].copy_from_slice(name.as_bytes());
        header[100..108].copy_from_slice(b"0000644\0");
        header[124..136].copy_from_slice(format!("{:011o}\0", data.len()).as_bytes());
        header[136..148].copy_from_slice(b"00000000000\0");
        header[156] = b'0';
        header[257..265].copy_from_slice(b"ustar\x0000");
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        header.extend(data);
        header.resize(header.len().next_multiple_of(BLOCK), 0);
        header
    }

    fn archive() -> Vec<u8> {
        [entry("hv.toml", b"sld"), entry("guests/a", &[7; 600]), vec![0; 2 * BLOCK]].concat()
    }

    #[test]
    fn files_are_found() {
        let data = archive();
        let ramdisk = Ramdisk::new(&data).unwrap();
        assert_eq!(ramdisk.config(), Ok(&b"sld"[..]));
        assert_eq!(ramdisk.file("guests/a").map(<[u8]>::len), Some(600));
        assert_eq!(ramdisk.file("guests/b"), None);
    }

    #[test]
    fn capitals_do_not_matter_where_one_name_fits() {
        let data =
            [entry("HV.TOML", b"x"), entry("guests/A", b"1"), entry("guests/a", b"2")].concat();
        let data = [data, vec![0; 2 * BLOCK]].concat();
        let ramdisk = Ramdisk::new(&data).unwrap();
        assert_eq!(ramdisk.config(), Ok(&b"x"[..]));
        assert_eq!(ramdisk.file("guests/a"), Some(&b"2"[..]));
        assert_eq!(ramdisk.file("guests/A"), Some(&b"1"[..]));
        assert_eq!(ramdisk.file("Guests/a"), Some(&b"1"[..]));
    }

    #[test]
    fn the_logs_area_comes_off() {
        let mut plain = archive();
        let (log, rest) = split_log(&mut plain);
        assert!(log.is_none() && rest == archive());
        let mut data = [entry(boot::log::NAME, &[7; 700]), archive()].concat();
        let (log, rest) = split_log(&mut data);
        assert_eq!(log.map(|log| log.len()), Some(1024));
        assert_eq!(rest, archive());
        // Cut off within the area, or somewhere else.
        for end in [0, 100, 511, 512, 1000, 1535] {
            let (log, rest) = split_log(&mut data[..end]);
            assert!(log.is_none() && rest.len() == end, "{end}");
        }
        let mut other = [entry("unsplit/log.txt", &[7; 700]), archive()].concat();
        assert!(split_log(&mut other).0.is_none());
    }

    #[test]
    fn whatever_is_cut_off_or_changed_is_noticed() {
        let data = archive();
        for end in 0..data.len() {
            assert!(Ramdisk::new(&data[..end]).is_err(), "{end}");
        }
        for at in (0..500).chain(1024..1500) {
            let mut damaged = data.clone();
            damaged[at] ^= 0x10;
            assert!(Ramdisk::new(&damaged).is_err(), "{at}");
        }
        assert_eq!(
            Ramdisk::new(&data[BLOCK * 2..]).and_then(|ramdisk| ramdisk.config()),
            Err(RamdiskError::NoConfig)
        );
    }
}
