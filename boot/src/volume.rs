//! The stick's files, for a firmware that reads sectors and knows of no files: a FAT volume.

use core::{fmt, ops::ControlFlow};

use arrayvec::{ArrayString, ArrayVec};
use hadris_fat::embedded::{Dir, File, MountToken, Node, Options, sync::Fat};
use hadris_fs::{DateTime, DirCursor, FileType, FsResult, OpenOptions};
use hadris_io::{Error as FsError, ErrorKind, ErrorType};
use hadris_storage::{BlockIndex, BlockSize, sync::BlockDevice};

use crate::{
    disk::SECTOR,
    stick::{GUESTS, MAX_FILES, is_image},
};

/// What stands for the whole in messages.
const VOLUME: &str = "the stick's file system";

/// The longest name of an image in bytes: with the directory's name it fits the ramdisk's format.
pub const MAX_NAME: usize = 100 - GUESTS.len() - 1;

/// Name of a file in messages; what is too long for it is cut off.
type Path = ArrayString<40>;

/// What goes wrong with a volume on a medium whose own errors are `E`.
#[derive(Debug)]
pub struct Error<E> {
    /// The file, or a description.
    what: Path,
    /// Whether it was to be read, not written.
    reading: bool,
    why: FsError<E>,
}

impl<E> Error<E> {
    fn new(what: &str, reading: bool, why: FsError<E>) -> Self {
        Self { what: cut(what), reading, why }
    }

    /// Whether the file is not there.
    pub fn is_missing(&self) -> bool {
        self.why.kind() == ErrorKind::NotFound
    }
}

/// As much of `text` as there is room for.
fn cut<const ROOM: usize>(text: &str) -> ArrayString<ROOM> {
    let mut result = ArrayString::new();
    // Until one does not fit.
    let _ = text.chars().try_for_each(|c| result.try_push(c));
    result
}

impl<E: fmt::Display> fmt::Display for Error<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { what, reading, why } = self;
        let verb = if *reading { "read" } else { "write" };
        match (why.kind(), why.device_error()) {
            (_, Some(error)) => write!(f, "cannot {verb} {what}: {error}"),
            (ErrorKind::NotFound, _) => write!(f, "there is no {what} on the stick"),
            (ErrorKind::NotRecognized | ErrorKind::Corrupt, _) => write!(
                f,
                "cannot {verb} {what}: the file system is damaged ({why}); repair it or write the \
                 image to the stick again"
            ),
            (ErrorKind::ReadOnly, _) => {
                write!(f, "cannot {verb} {what}: the stick is write-protected")
            }
            _ => write!(f, "cannot {verb} {what}: {why}"),
        }
    }
}

/// A file of [`GUESTS`].
#[derive(Clone, Copy, Debug)]
pub struct Image<'mount> {
    /// Its name in the directory.
    pub name: ArrayString<MAX_NAME>,
    /// Its size.
    pub bytes: u64,
    node: Node<'mount>,
}

/// What a mounted volume needs besides itself.
#[derive(Default)]
pub struct Storage {
    token: MountToken,
    windows: [Window; 4],
}

/// A mounted volume. Paths have slashes; upper and lower case are the same to it.
pub struct Volume<'mount, D>(Fat<'mount, ReadAhead<'mount, D>, 1>);

impl<'mount, D: BlockDevice> Volume<'mount, D> {
    /// The volume on `device`; `clock` dates what is written.
    pub fn mount(
        device: D,
        storage: &'mount mut Storage,
        clock: fn() -> DateTime,
    ) -> Result<Self, Error<D::Error>> {
        let Storage { token, windows } = storage;
        let options = Options::new().with_clock(clock);
        Fat::mount_with(ReadAhead { device, windows }, token, options)
            .map(Self)
            .map_err(|error| Error::new(VOLUME, true, error.into_error()))
    }

    /// The size of a file in bytes.
    pub fn size(&mut self, path: &str) -> Result<u64, Error<D::Error>> {
        let result = self.parent(path).and_then(|(dir, name)| {
            let metadata = self.0.metadata(dir, name)?;
            match metadata.file_type() {
                FileType::File => Ok(metadata.len()),
                _ => Err(ErrorKind::IsADirectory.into()),
            }
        });
        result.map_err(|why| Error::new(path, true, why))
    }

    /// Reads a file that has `into.len()` bytes.
    pub fn read(&mut self, path: &str, into: &mut [u8]) -> Result<(), Error<D::Error>> {
        let result = self.parent(path).and_then(|(dir, name)| {
            let file = self.0.open(dir, name, OpenOptions::new().read())?;
            self.fill(file, into)
        });
        result.map_err(|why| Error::new(path, true, why))
    }

    /// Reads an image, which has `into.len()` bytes.
    pub fn read_image(
        &mut self,
        image: &Image<'_>,
        into: &mut [u8],
    ) -> Result<(), Error<D::Error>> {
        let result = self
            .0
            .open_node(image.node, OpenOptions::new().read())
            .and_then(|file| self.fill(file, into));
        result.map_err(|why| Error::new(&image.name, true, why))
    }

    /// Writes a file, in place of one that may be there.
    pub fn write(&mut self, path: &str, contents: &[u8]) -> Result<(), Error<D::Error>> {
        let result = self.parent(path).and_then(|(dir, name)| {
            let options = OpenOptions::new().write().create().truncate();
            let file = self.0.open(dir, name, options)?;
            let written = self.0.write(&file, contents);
            self.0.close(file)?;
            written?;
            self.0.sync()
        });
        result.map_err(|why| Error::new(path, false, why))
    }

    /// All images in [`GUESTS`]; none if there is no such directory.
    pub fn images(&mut self) -> Result<ArrayVec<Image<'mount>, MAX_FILES>, Error<D::Error>> {
        let mut images = ArrayVec::new();
        let mut refused = Ok(());
        let listed = self.0.open_dir(self.0.root(), GUESTS).and_then(|dir| {
            self.0.list(dir, DirCursor::START, |entry| {
                let mut name = ArrayString::new();
                let fits = entry.chars().try_for_each(|c| name.try_push(c)).is_ok();
                if entry.is_dir() || !is_image(&name) {
                    return ControlFlow::Continue(());
                }
                if !fits {
                    let why = FsError::new(ErrorKind::NameTooLong, "the name is too long");
                    refused = Err(Error::new(&name, true, why));
                    return ControlFlow::Break(());
                }
                let image = Image { name, bytes: entry.len(), node: entry.node() };
                if images.try_push(image).is_err() {
                    let why = FsError::new(ErrorKind::LimitExceeded, "there are too many files");
                    refused = Err(Error::new(GUESTS, true, why));
                    return ControlFlow::Break(());
                }
                ControlFlow::Continue(())
            })
        });
        match listed {
            Err(why) if why.kind() != ErrorKind::NotFound => Err(Error::new(GUESTS, true, why)),
            _ => refused.map(|()| images),
        }
    }

    /// Reads all of `into` from the start of `file`, and closes that.
    fn fill(&mut self, file: File<'_>, into: &mut [u8]) -> FsResult<(), D::Error> {
        let read = self.0.read(&file, into);
        self.0.close(file)?;
        if read? == into.len() {
            Ok(())
        } else {
            Err(FsError::new(ErrorKind::Corrupt, "it has become shorter"))
        }
    }

    /// The directory of `path` and the name in it.
    fn parent<'path>(&mut self, path: &'path str) -> FsResult<(Dir, &'path str), D::Error> {
        let mut dir = self.0.root();
        let mut rest = path;
        while let Some((name, after)) = rest.split_once('/') {
            dir = self.0.open_dir(dir, name)?;
            rest = after;
        }
        Ok((dir, rest))
    }
}

/// How many sectors a window has.
const WINDOW: usize = 8;

/// Neighbouring sectors of the medium.
struct Window {
    sectors: [[u8; SECTOR]; WINDOW],
    /// The first of them, and how many there are.
    first: u64,
    valid: usize,
}

impl Default for Window {
    fn default() -> Self {
        Self { sectors: [[0; SECTOR]; WINDOW], first: 0, valid: 0 }
    }
}

impl Window {
    /// Where `sector` is.
    fn place(&mut self, sector: u64) -> Option<&mut [u8; SECTOR]> {
        let index = usize::try_from(sector.checked_sub(self.first)?).ok()?;
        self.sectors[..self.valid].get_mut(index)
    }
}

/// A device of which single sectors are read several at a time: the file system asks for those of
/// its own structures one by one, and a BIOS takes as long for one as for many.
struct ReadAhead<'mount, D> {
    device: D,
    /// The last used comes first.
    windows: &'mount mut [Window],
}

impl<D: BlockDevice> ReadAhead<'_, D> {
    /// Puts the window that holds `sector` first: one that does already, or the one that has not been
    /// used for the longest time. Whether it could be read.
    fn find(&mut self, sector: u64) -> bool {
        let found = self.windows.iter_mut().position(|window| window.place(sector).is_some());
        let index = found.unwrap_or(self.windows.len() - 1);
        self.windows[..=index].rotate_right(1);
        if found.is_some() {
            return true;
        }
        let left = self.device.block_count().saturating_sub(sector);
        let count = left.min(WINDOW as u64) as usize;
        let window = &mut self.windows[0];
        let into = window.sectors[..count].as_flattened_mut();
        let is_read = self.device.read_blocks(BlockIndex::new(sector), into).is_ok();
        (window.first, window.valid) = (sector, if is_read { count } else { 0 });
        is_read
    }
}

impl<D: ErrorType> ErrorType for ReadAhead<'_, D> {
    type Error = D::Error;
}

impl<D: BlockDevice> BlockDevice for ReadAhead<'_, D> {
    fn block_size(&self) -> BlockSize {
        self.device.block_size()
    }

    fn block_count(&self) -> u64 {
        self.device.block_count()
    }

    fn writable(&self) -> bool {
        self.device.writable()
    }

    fn read_blocks(&mut self, first: BlockIndex, buf: &mut [u8]) -> Result<(), FsError<D::Error>> {
        if buf.len() == SECTOR
            && self.find(first.get())
            && let Some(sector) = self.windows[0].place(first.get())
        {
            buf.copy_from_slice(sector);
            return Ok(());
        }
        // If those around it cannot be read, the sector itself perhaps can.
        self.device.read_blocks(first, buf)
    }

    fn write_blocks(&mut self, first: BlockIndex, buf: &[u8]) -> Result<(), FsError<D::Error>> {
        let written = self.device.write_blocks(first, buf);
        let (sectors, _) = buf.as_chunks::<SECTOR>();
        for (sector, contents) in (first.get()..).zip(sectors) {
            for window in self.windows.iter_mut() {
                match (&written, window.place(sector)) {
                    (Ok(()), Some(place)) => *place = *contents,
                    (Err(_), Some(_)) => window.valid = 0,
                    (_, None) => (),
                }
            }
        }
        written
    }
}

#[cfg(test)]
mod tests {
    use std::{cell::RefCell, rc::Rc};

    use hadris_fat::{FatKind, FatOptions, VolumeLabel, sync::format};
    use hadris_fs::NoClock;

    use super::*;

    /// A medium in memory that counts what is asked of it.
    #[derive(Clone)]
    struct Medium(Rc<RefCell<State>>);

    struct State {
        bytes: Vec<u8>,
        /// A sector that cannot be read.
        bad: Option<usize>,
        write_protected: bool,
        reads: usize,
    }

    #[derive(Debug)]
    struct Unreadable(usize);

    impl fmt::Display for Unreadable {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "sector {} is bad", self.0)
        }
    }

    impl core::error::Error for Unreadable {}

    impl ErrorType for Medium {
        type Error = Unreadable;
    }

    impl BlockDevice for Medium {
        fn block_size(&self) -> BlockSize {
            BlockSize::new(SECTOR as u32).unwrap()
        }

        fn block_count(&self) -> u64 {
            (self.0.borrow().bytes.len() / SECTOR) as u64
        }

        fn writable(&self) -> bool {
            true
        }

        fn read_blocks(
            &mut self,
            first: BlockIndex,
            buf: &mut [u8],
        ) -> Result<(), FsError<Unreadable>> {
            let mut state = self.0.borrow_mut();
            state.reads += 1;
            let first = first.get() as usize;
            if let Some(bad) = state.bad
                && (first..first + buf.len() / SECTOR).contains(&bad)
            {
                return Err(FsError::device(Unreadable(bad), ""));
            }
            buf.copy_from_slice(&state.bytes[first * SECTOR..][..buf.len()]);
            Ok(())
        }

        fn write_blocks(
            &mut self,
            first: BlockIndex,
            buf: &[u8],
        ) -> Result<(), FsError<Unreadable>> {
            let mut state = self.0.borrow_mut();
            if state.write_protected {
                return Err(ErrorKind::ReadOnly.into());
            }
            state.bytes[first.get() as usize * SECTOR..][..buf.len()].copy_from_slice(buf);
            Ok(())
        }
    }

    const KERNEL: &str = "unsplit/kernel.elf";

    /// Contents that show when a sector is in the wrong place.
    fn contents(bytes: usize) -> Vec<u8> {
        (0..bytes).map(|i| (i / 7 + i / SECTOR) as u8).collect()
    }

    /// A volume whose label is the name of a directory, with a kernel and three images.
    fn stick(mib: usize, kind: FatKind) -> Medium {
        let state =
            State { bytes: vec![0; mib << 20], bad: None, write_protected: false, reads: 0 };
        let mut medium = Medium(Rc::new(RefCell::new(state)));
        let label = VolumeLabel::new("UNSPLIT").unwrap();
        format(&mut medium, &FatOptions::new().with_kind(kind).with_label(label)).unwrap();
        let mut token = MountToken::new();
        let mut fat: Fat<_> = Fat::mount(medium.clone(), &mut token).unwrap();
        for dir in ["unsplit", "guests", "guests/more"] {
            fat.create_dir_all(fat.root(), dir).unwrap();
        }
        assert!(fat.unmount().is_ok());
        let mut storage = Storage::default();
        let mut volume = mount(&medium, &mut storage);
        for (path, bytes) in [
            (KERNEL, 3_000_001),
            ("hv.toml", 100),
            ("guests/Linux with a long name", 70_000),
            ("guests/._Linux with a long name", 100),
            ("guests/empty", 0),
            ("guests/SHORT.ELF", 513),
            ("guests/more/hidden", 1),
        ] {
            volume.write(path, &contents(bytes)).unwrap();
        }
        medium.0.borrow_mut().reads = 0;
        medium
    }

    fn mount<'mount>(medium: &Medium, storage: &'mount mut Storage) -> Volume<'mount, Medium> {
        Volume::mount(medium.clone(), storage, || NoClock::TIME).unwrap()
    }

    #[test]
    fn files_are_read_whatever_the_case_of_their_names() {
        for (mib, kind) in [(8, FatKind::Fat16), (256, FatKind::Fat32)] {
            let medium = stick(mib, kind);
            let mut storage = Storage::default();
            let mut volume = mount(&medium, &mut storage);
            for (path, bytes) in [(KERNEL, 3_000_001), ("HV.TOML", 100), ("guests/empty", 0)] {
                assert_eq!(volume.size(path).unwrap(), bytes);
                let mut into = vec![0xa5; bytes as usize];
                volume.read(path, &mut into).unwrap();
                assert_eq!(into, contents(into.len()), "{path}");
            }
            // The file allocation table several sectors at a time, the file itself in one piece.
            let reads = medium.0.borrow().reads;
            assert!(reads < 30, "{kind:?}: {reads}");
        }
    }

    #[test]
    fn images_are_the_visible_files() {
        let medium = stick(8, FatKind::Fat16);
        let mut storage = Storage::default();
        let mut volume = mount(&medium, &mut storage);
        let images = volume.images().unwrap();
        let found: Vec<_> = images.iter().map(|image| (image.name.as_str(), image.bytes)).collect();
        let expected = [("Linux with a long name", 70_000), ("empty", 0), ("SHORT.ELF", 513)];
        assert_eq!(found, expected);
        for image in &images {
            let mut into = vec![0xa5; image.bytes as usize];
            volume.read_image(image, &mut into).unwrap();
            assert_eq!(into, contents(into.len()));
        }

        volume.write(&format!("guests/{}", "x".repeat(MAX_NAME)), b"").unwrap();
        assert_eq!(volume.images().unwrap().len(), 4);
        volume.write(&format!("guests/{}", "x".repeat(MAX_NAME + 1)), b"").unwrap();
        let refused = volume.images().unwrap_err().to_string();
        assert!(refused.contains("xxx: the name is too long"), "{refused}");
    }

    #[test]
    fn no_more_images_than_there_is_room_for() {
        let medium = stick(8, FatKind::Fat16);
        let mut storage = Storage::default();
        let mut volume = mount(&medium, &mut storage);
        for i in 3..MAX_FILES {
            volume.write(&format!("guests/{i}"), b"").unwrap();
        }
        assert_eq!(volume.images().unwrap().len(), MAX_FILES);
        volume.write("guests/more than that", b"").unwrap();
        let refused = volume.images().unwrap_err().to_string();
        assert!(refused.contains("guests: there are too many"), "{refused}");
    }

    #[test]
    fn what_is_written_replaces_what_was_there() {
        let medium = stick(8, FatKind::Fat16);
        for bytes in [100_000, 10, 131_072] {
            let mut storage = Storage::default();
            mount(&medium, &mut storage).write("unsplit/log.txt", &contents(bytes)).unwrap();
            let mut storage = Storage::default();
            let mut volume = mount(&medium, &mut storage);
            assert_eq!(volume.size("unsplit/log.txt").unwrap(), bytes as u64);
            let mut into = vec![0; bytes];
            volume.read("unsplit/log.txt", &mut into).unwrap();
            assert_eq!(into, contents(bytes));
        }
        let mut medium = medium;
        let mut scratch = [0; 4096];
        let report = hadris_fat::sync::check(&mut medium, &mut scratch, |finding| {
            println!("{finding}");
        });
        assert!(report.unwrap().is_clean());
    }

    #[test]
    fn what_is_not_there_is_named() {
        let medium = stick(8, FatKind::Fat16);
        let mut storage = Storage::default();
        let mut volume = mount(&medium, &mut storage);
        for path in ["unsplit/kernel.sum", "nowhere/hv.toml"] {
            let missing = volume.size(path).unwrap_err();
            assert!(missing.is_missing());
            assert_eq!(missing.to_string(), format!("there is no {path} on the stick"));
        }
        let refused = volume.size("guests").unwrap_err();
        assert!(!refused.is_missing());
        assert!(refused.to_string().starts_with("cannot read guests: "), "{refused}");
    }

    #[test]
    fn trouble_with_the_medium_is_named() {
        let medium = stick(8, FatKind::Fat16);
        let mut storage = Storage::default();
        let mut volume = mount(&medium, &mut storage);
        let end = medium.0.borrow().bytes.len() / SECTOR;
        let mut into = vec![0; 3_000_001];
        let mut seen = 0;
        for bad in (0..end).step_by(1000) {
            medium.0.borrow_mut().bad = Some(bad);
            if let Err(error) = volume.read(KERNEL, &mut into) {
                assert_eq!(error.to_string(), format!("cannot read {KERNEL}: sector {bad} is bad"));
                seen += 1;
            }
        }
        assert!((5..=7).contains(&seen), "{seen}");
        // A bad sector beside the one that is wanted does no harm.
        medium.0.borrow_mut().bad = Some(10);
        let mut storage = Storage::default();
        let mut volume = mount(&medium, &mut storage);
        assert_eq!(volume.size(KERNEL).unwrap(), 3_000_001);

        medium.0.borrow_mut().write_protected = true;
        let refused = volume.write("unsplit/log.txt", b"log").unwrap_err().to_string();
        assert_eq!(refused, "cannot write unsplit/log.txt: the stick is write-protected");
    }

    #[test]
    fn damage_is_refused_with_advice() {
        let medium = stick(8, FatKind::Fat16);
        let mount = |storage| Volume::mount(medium.clone(), storage, || NoClock::TIME);
        // Chains that lead nowhere.
        let reserved = {
            let bytes = &medium.0.borrow().bytes;
            usize::from(u16::from_le_bytes([bytes[14], bytes[15]])) * SECTOR
        };
        medium.0.borrow_mut().bytes[reserved + 4..reserved + 8 * SECTOR].fill(0);
        let mut storage = Storage::default();
        let mut volume = mount(&mut storage).map_err(|error| error.to_string()).unwrap();
        let refused = volume.read(KERNEL, &mut vec![0; 3_000_001]).unwrap_err().to_string();
        assert!(refused.contains("file system is damaged"), "{refused}");
        // No volume at all.
        medium.0.borrow_mut().bytes[..SECTOR].fill(0);
        let mut storage = Storage::default();
        let refused = mount(&mut storage).err().unwrap().to_string();
        assert!(refused.starts_with("cannot read the stick's file system: "), "{refused}");
    }
}
