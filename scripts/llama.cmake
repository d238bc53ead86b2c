# Has llama.cpp's build make the libraries that are loaded here, 74 files of 178:
#   CMAKE_ARGS="-DCMAKE_PROJECT_llama_cpp_INCLUDE=/path/to/this/file" pip install …
# The build forces LLAMA_BUILD_COMMON on in CMake's cache, but a variable goes before that.
set(LLAMA_BUILD_COMMON OFF)
set(LLAVA_BUILD OFF)
