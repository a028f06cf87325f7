// Stands in for DJL's tokenizers, which are the Rust ones of the Python package: each call goes to the parent process.
package ai.djl.huggingface.tokenizers

import ai.onnxruntime.Parent
import java.nio.file.Path

class Encoding(val ids: LongArray)

class HuggingFaceTokenizer private constructor() : AutoCloseable {
    fun encode(text: String, addSpecialTokens: Boolean, withOverflowingTokens: Boolean): Encoding {
        check(!withOverflowingTokens)
        Parent.to.writeByte('E'.code)
        Parent.to.writeBoolean(addSpecialTokens)
        Parent.writeText(text)
        Parent.to.flush()
        return Encoding(LongArray(Parent.from.readInt()) { Parent.from.readLong() })
    }

    fun decode(ids: LongArray, skipSpecialTokens: Boolean): String {
        Parent.to.writeByte('D'.code)
        Parent.to.writeBoolean(skipSpecialTokens)
        Parent.to.writeInt(ids.size)
        ids.forEach { Parent.to.writeLong(it) }
        Parent.to.flush()
        return Parent.readText()
    }

    override fun close() {}

    companion object {
        fun newInstance(path: Path) = HuggingFaceTokenizer().also { check(path.toFile().isFile) }
    }
}
