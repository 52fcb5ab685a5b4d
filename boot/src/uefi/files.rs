//! The stick's files, through the firmware.

use boot::stick;
use uefi::{
    CStr16, Status,
    boot::{self as services, ScopedProtocol},
    proto::{
        loaded_image::LoadedImage,
        media::{
            file::{Directory, File, FileAttribute, FileInfo, FileMode, RegularFile},
            fs::SimpleFileSystem,
        },
    },
};

use crate::failure::{Failure, MAX_PATH, Path};

/// The file system from which the firmware loaded the loader.
pub struct Stick {
    // Closed before the protocol is.
    root: Directory,
    _volume: ScopedProtocol<SimpleFileSystem>,
}

/// A file that is there.
pub struct Reader {
    file: RegularFile,
    path: Path,
    /// Its size.
    pub bytes: u64,
}

/// Room for what the firmware tells of a file: 80 bytes and a name of at most 255 characters.
#[repr(C, align(8))]
struct InfoBuffer([u8; 80 + 2 * 256]);

impl InfoBuffer {
    const EMPTY: Self = Self([0; 80 + 2 * 256]);
}

impl Stick {
    /// Opens it.
    pub fn open() -> Result<Self, Failure> {
        let refused =
            |what| move |error: uefi::Error| Failure::Firmware { what, status: error.status() };
        let image = services::open_protocol_exclusive::<LoadedImage>(services::image_handle())
            .map_err(refused("to tell where the loader comes from"))?;
        let device = image.device().ok_or(Failure::Firmware {
            what: "to tell which device the loader comes from",
            status: Status::NOT_FOUND,
        })?;
        let mut volume = services::open_protocol_exclusive::<SimpleFileSystem>(device)
            .map_err(refused("access to the stick's file system"))?;
        let root = volume.open_volume().map_err(refused("to open the stick's file system"))?;
        Ok(Self { root, _volume: volume })
    }

    /// A file that must be there.
    pub fn open_file(&mut self, path: &str) -> Result<Reader, Failure> {
        self.find_file(path)?.ok_or(Failure::Missing(shown(path)))
    }

    /// A file that may be missing.
    pub fn find_file(&mut self, path: &str) -> Result<Option<Reader>, Failure> {
        let failed = |status| Failure::Unreadable { path: shown(path), status };
        let Some(mut file) = self.file(path, FileMode::Read).map_err(failed)? else {
            return Ok(None);
        };
        let mut buffer = InfoBuffer::EMPTY;
        let info = file.get_info::<FileInfo>(&mut buffer.0);
        let bytes = info.map_err(|error| failed(error.status()))?.file_size();
        Ok(Some(Reader { file, path: shown(path), bytes }))
    }

    /// Name and size of each guest's image, one after the other.
    pub fn for_each_image(
        &mut self,
        mut what: impl FnMut(&str, u64) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let failed =
            |error: Status| Failure::Unreadable { path: shown(stick::GUESTS), status: error };
        let mut buffer = [0; MAX_PATH + 1];
        let opened = self.root.open(
            encode(stick::GUESTS, &mut buffer).ok_or(Failure::BadName)?,
            FileMode::Read,
            FileAttribute::empty(),
        );
        let directory = match opened {
            Ok(file) => file.into_directory(),
            Err(error) if error.status() == Status::NOT_FOUND => None,
            Err(error) => return Err(failed(error.status())),
        };
        let Some(mut directory) = directory else {
            return Ok(());
        };
        let mut buffer = InfoBuffer::EMPTY;
        while let Some(entry) =
            directory.read_entry(&mut buffer.0).map_err(|error| failed(error.status()))?
        {
            if entry.is_regular_file() {
                let name = decode(entry.file_name()).ok_or(Failure::BadName)?;
                if stick::is_image(&name) {
                    what(&name, entry.file_size())?;
                }
            }
        }
        Ok(())
    }

    /// Replaces a file, or makes it.
    pub fn write(&mut self, path: &str, contents: &[u8]) -> Result<(), Status> {
        if let Some(old) = self.file(path, FileMode::ReadWrite)? {
            old.delete().map_err(|error| error.status())?;
        }
        let mut new = self.file(path, FileMode::CreateReadWrite)?.ok_or(Status::NOT_FOUND)?;
        new.write(contents).map_err(|error| error.status())?;
        new.flush().map_err(|error| error.status())
    }

    fn file(&mut self, path: &str, mode: FileMode) -> Result<Option<RegularFile>, Status> {
        let mut buffer = [0; MAX_PATH + 1];
        let name = encode(path, &mut buffer).ok_or(Status::INVALID_PARAMETER)?;
        match self.root.open(name, mode, FileAttribute::empty()) {
            Ok(file) => file.into_regular_file().ok_or(Status::NOT_FOUND).map(Some),
            Err(error) if error.status() == Status::NOT_FOUND => Ok(None),
            Err(error) => Err(error.status()),
        }
    }
}

impl Reader {
    /// Reads as much as `into` holds, which is not more than there is.
    pub fn read(&mut self, into: &mut [u8]) -> Result<(), Failure> {
        let read = self
            .file
            .read(into)
            .map_err(|error| Failure::Unreadable { path: self.path, status: error.status() })?;
        if read < into.len() {
            return Err(Failure::WrongSize(self.path));
        }
        Ok(())
    }
}

/// A path for a message.
pub fn shown(path: &str) -> Path {
    let mut shown = Path::new();
    for letter in path.chars() {
        if shown.try_push(letter).is_err() {
            break;
        }
    }
    shown
}

/// A path as the firmware takes it.
fn encode<'a>(path: &str, buffer: &'a mut [u16; MAX_PATH + 1]) -> Option<&'a CStr16> {
    let mut length = 0;
    for unit in path.encode_utf16().chain([0]) {
        *buffer.get_mut(length)? = if unit == u16::from(b'/') { b'\\'.into() } else { unit };
        length += 1;
    }
    CStr16::from_u16_with_nul(&buffer[..length]).ok()
}

/// A file's name.
fn decode(name: &CStr16) -> Option<Path> {
    let mut decoded = Path::new();
    for letter in name.iter() {
        decoded.try_push(char::from(*letter)).ok()?;
    }
    Some(decoded)
}
